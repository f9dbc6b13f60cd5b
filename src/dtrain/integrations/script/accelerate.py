"""The environment in which `accelerate launch` starts a script, from Accelerate's config file."""

from __future__ import annotations

import os
from pathlib import Path

from dtrain.errors import UsageError

_OF_DTRAIN = {"MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"}
"""Variables of the launch. dtrain has set them for this rank."""


def set_environment(config: Path) -> None:
    """Set the variables that `accelerate launch --config_file` would set in this process.

    They are computed by Accelerate's own functions: mixed precision, dynamo, FSDP and the like. A
    variable that the job sets itself keeps its value.

    Args:
        config: the config file.

    Raises:
        UsageError: Accelerate does not accept the file.
    """
    from accelerate.commands import launch

    arguments = launch.launch_command_parser().parse_args(["--config_file", str(config), "script"])
    try:
        arguments, _, _ = launch._validate_launch_command(arguments)
        # The rendezvous is dtrain's. Accelerate would look for its address and a free port.
        arguments.num_machines, arguments.main_process_port = 1, 0
        if arguments.multi_gpu or arguments.use_fsdp:
            found = launch.prepare_multi_gpu_env(arguments)
        else:
            _, found = launch.prepare_simple_launcher_cmd_env(arguments)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OSError) as error:
        raise UsageError(
            f"accelerate does not accept {config}: {type(error).__name__}: {error}",
            code="script.accelerate-config",
        ) from error
    new = found.keys() - os.environ.keys() - _OF_DTRAIN
    os.environ.update({name: found[name] for name in new})
