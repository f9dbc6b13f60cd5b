"""The weights of another training, which a run starts with: `checkpoint.init_from`."""
