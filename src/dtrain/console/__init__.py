"""What a person sees: lines of many ranks folded into few, and a launch as it goes."""
