"""Checks of a host, a job and a launch, each with the command that mends what it finds.

The package has the checks themselves. `dtrain.diagnosing` makes those of `dtrain doctor`, and
`dtrain.node.preflight` those of `dtrain launch --preflight`.
"""
