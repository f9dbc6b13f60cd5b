"""Tests that run in several real processes: a pytest plugin, and `run_ranks` for any script.

::

    @pytest.mark.ranks(4)
    def test_sum(rank, world_size):
        total = torch.tensor(float(rank))
        dist.all_reduce(total)
        assert total == sum(range(world_size))

The body runs in four processes, forked from one that imported torch once, with the environment
that torchrun would give them and a gloo process group up. Everything else of the test (fixtures,
parametrization, marks) happens in pytest's own process as usual.

Marker: `ranks(world_size=None, *, nodes=1, ranks=None, timeout=60.0, init=True)`.

* `world_size`: number of ranks; left out, it is the test's `world_size` argument, so
  `@pytest.mark.parametrize("world_size", [1, 2, 4])` works. Or `nodes=2, ranks=2`: ranks per node.
* `timeout`: seconds until every rank's stack is shown and all are killed.
* `init=False`: no process group; a plain `init_process_group("gloo")` of your own will work.

Fixtures: `rank` (known in the body only), `world_size`, and `leak_guard`, which fails a test that
leaves processes, listening ports, files in /dev/shm or environment variables behind.

What to know:

* The ranks are forked as the test modules were once collected: what a fixture later changes in a
  module's globals is not seen there. Values of fixtures are pickled into the ranks; environment
  variables, working directory, `sys.path` and warning filters are carried over.
* The ranks' ways of ending: a failing rank ends at once, so that the others' collectives fail too;
  those that still run a second later are killed. A passing rank waits until all have finished.
* Nothing is torn down: ranks that have reported are killed, which is 10 times quicker than
  `destroy_process_group` and cannot hang.

Linux only.
"""

from dtrain.testing.calls import RankError, run_ranks

__all__ = ["RankError", "run_ranks"]

# Read by pytest when it loads this module as a plugin (entry point `dtrain`, or `-p`).
pytest_plugins = ("dtrain.testing.plugin", "dtrain.testing.leaks")
