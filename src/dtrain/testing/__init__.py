"""Tests that run in several real processes: a pytest plugin, and `run_ranks` for any script.

::

    @pytest.mark.ranks(4)
    def test_sum(rank, world_size):
        total = torch.tensor(float(rank))
        dist.all_reduce(total)
        assert total == sum(range(world_size))

The body runs in four processes, forked from one that imported torch once. They have the
environment that torchrun would set, and a gloo process group is initialized. Everything else of
the test (fixtures, parametrization, marks) happens in pytest's own process as usual.

Marker: `ranks(world_size=None, *, nodes=1, ranks=None, timeout=60.0, init=True)`.

* `world_size`: the number of ranks. Without it, it is the test's `world_size` argument, so
  `@pytest.mark.parametrize("world_size", [1, 2, 4])` works. Or `nodes=2, ranks=2`: ranks per node.
* `timeout`: seconds until every rank's stack is shown and all are killed.
* `init=False`: no process group. A plain `init_process_group("gloo")` in the body works then.

Fixtures: `rank` (known in the body only), `world_size`, and `leak_guard`, which fails a test that
leaves processes, listening ports, files in /dev/shm or environment variables behind.

Rules:

* The ranks are forked from the state of the test modules after collection. If a fixture later
  changes a module's globals, the ranks do not see it. Values of fixtures are pickled into the
  ranks. Environment variables, working directory, `sys.path` and warning filters are transferred.
* A failing rank exits at once, so that the others' collectives fail too. Ranks that still run a
  second later are killed. A passing rank waits until all have finished.
* Nothing is torn down. Ranks that have reported are killed, which is 10 times faster than
  `destroy_process_group` and cannot hang.

Linux only.
"""

from dtrain.testing.calls import RankError, run_ranks

__all__ = ["RankError", "run_ranks"]

# Read by pytest when it loads this module as a plugin (entry point `dtrain`, or `-p`).
pytest_plugins = ("dtrain.testing.plugin", "dtrain.testing.leaks")
