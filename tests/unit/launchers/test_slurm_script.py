"""The batch script and what goes into it: the whole text, quoting, and every option."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtrain import planning
from dtrain.assets import asset_dir
from dtrain.errors import JobError, PlanError
from dtrain.job.launcher_options import AnyOptions
from dtrain.job.profile import load_profile, parse_options
from dtrain.job.spec import JobSpec
from dtrain.launch_plan import Facts, LaunchPlan, make_plan
from dtrain.launchers import base
from dtrain.launchers.slurm import queue, sbatch, script, submitit
from dtrain.launchers.slurm.launcher import SlurmLauncher, _check_shared_flags
from dtrain.launchers.slurm.options import SlurmOptions
from dtrain.launchers.slurm.sbatch import Sbatch
from dtrain.launchers.slurm.submitit import Submitit
from dtrain.planning import Request
from support.errors import assert_named, assert_problems, raises

FACTS = Facts("digits-abc234", "/runs", "/usr/bin/python3", "laptop", cores=8, free_port=16000)
JOB: dict[str, Any] = {
    "name": "digits", "task": "task.py:T", "train": {"epochs": 1, "global_batch_size": 8},
}  # fmt: skip

GOLDEN = """\
#!/bin/bash
# Run digits-abc234 of dtrain, made by `dtrain launch`. Starts one node agent on each node.
#SBATCH --job-name=digits-abc234
#SBATCH --comment="dtrain run digits-abc234 for the paper"
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --partition=gpu
#SBATCH --account=physics
#SBATCH --time=0-20:00:00
#SBATCH --mem=64G
#SBATCH --mail-user=me@example.org
#SBATCH --mail-type=END,FAIL,REQUEUE
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --exclusive
#SBATCH --nice=100

set -e
ulimit -n 4096
module load cuda/12.4 'odd name'
. /envs/train/bin/activate
set +e

trap : TERM USR2 # the agents exit cleanly, and the shell waits for them
srun \\
  --nodes=2 \\
  --ntasks=2 \\
  --ntasks-per-node=1 \\
  --cpus-per-task=16 \\
  --kill-on-bad-exit=1 \\
  --wait=40 \\
  /envs/train/bin/python -P -m dtrain.node /runs/digits-abc234 --placement slurm
status=$?

# The first agent creates this file if the training is to continue in another attempt. If another
# node has failed, srun asks the first agent to exit too; then the job is not requeued.
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
if [ "$status" = 0 ] &&
  [ -e /runs/digits-abc234/slurm/requeue-"${SLURM_RESTART_COUNT:-0}" ] &&
  [ "$(squeue -h -j "$job" -o %T)" = RUNNING ]; then
  scontrol requeue "$job"
fi
exit "$status"
"""


def plan_of(
    facts: Facts = FACTS, launch: dict[str, Any] | None = None, **options: Any
) -> LaunchPlan:
    job = JobSpec.model_validate({**JOB, "launch": launch or {"nodes": 2}})
    made = make_plan(
        job,
        job_dir="/job",
        launcher="slurm",
        profile="slurm",
        options=SlurmOptions.of(AnyOptions(**options)),
        facts=facts,
    )
    return base.load("slurm").complete(made, facts)


def test_the_whole_script() -> None:
    plan = plan_of(
        launch={"nodes": 2, "gpus_per_node": 4}, partition="gpu", account="physics", time="20h",
        mem="64G", cpus_per_node=16, comment="for the paper", mail="me@example.org",
        slurm={"exclusive": True, "nice": "100", "spread-job": False},
        setup=["ulimit -n 4096"], modules=["cuda/12.4", "odd name"], venv="/envs/train",
    )  # fmt: skip
    assert script.render(plan) == GOLDEN
    assert plan.threads_per_proc == 4
    assert (plan.rdzv_host, plan.rdzv_port, plan.node_names) == ("", 0, ("", ""))


def test_every_profile_option_is_known_and_has_its_default() -> None:
    profile = load_profile("slurm", ".")
    options = {name: value for name, value in profile.spec.options.items() if value is not None}
    assert set(profile.spec.options) == set(SlurmOptions.model_fields)
    assert SlurmOptions.model_validate({**options, "signal_before": 120.0}) == SlurmOptions()


def test_containers() -> None:
    apptainer = plan_of(apptainer="image.sif", container_args=["--nv"])
    assert (
        "  apptainer exec --bind /runs/digits-abc234 --bind /job --nv image.sif "
        "python -P -m dtrain.node /runs/digits-abc234 --placement slurm\n"
    ) in script.render(apptainer)
    pyxis = script.render(plan_of(pyxis="nvcr.io#nvidia/pytorch:25.01"))
    assert "  '--container-image=nvcr.io#nvidia/pytorch:25.01' \\\n" in pyxis
    assert "--container-mounts=/runs/digits-abc234:/runs/digits-abc234,/job:/job" in pyxis
    with raises("option.invalid-value", "apptainer", "pyxis"):
        plan_of(apptainer="a", pyxis="b")


HOSTILE = ["a b", "it's", 'so "so"', "a;touch gone", "$(touch gone)", "`touch gone`", "a\\b", "#x",
           "100%j", "--flag"]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_the_shell_sees_values_as_they_are(text: str, tmp_path: Path) -> None:
    """The script run by bash, with an srun that tells what it was given."""
    for name in ("srun", "squeue", "scontrol", "module"):
        command = 'printf "%s\\0" "$@" > "$(dirname "$0")"/$(basename "$0").argv\n'
        (tmp_path / name).write_text("#!/bin/bash\n" + command)
        (tmp_path / name).chmod(0o755)
    runs = str(tmp_path / text.replace("\\", "/"))
    options = {"modules": [text], "python": text, "pyxis": text, "comment": text}
    plan = plan_of(replace(FACTS, runs=runs), **options)
    rendered = script.render(plan)
    done = subprocess.run(
        ["bash", "-c", rendered], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    srun = (tmp_path / "srun.argv").read_text().split("\0")
    node = [text, "-P", "-m", "dtrain.node", f"{runs}/digits-abc234", "--placement", "slurm", ""]
    assert srun[-8:] == node
    assert f"--container-image={text}" in srun
    assert (tmp_path / "module.argv").read_text().split("\0") == ["load", text, ""]
    assert not list(tmp_path.rglob("gone"))


@pytest.mark.parametrize("name", ["partition", "comment", "time"])
def test_a_line_break_cannot_come_out_of_a_directive(name: str) -> None:
    with raises("option.invalid-value", name):
        plan_of(**{name: "x\ntouch gone"})
    with raises("option.invalid-value", "slurm.nice"):
        plan_of(slurm={"nice": "1\ntouch gone"})


def test_no_secret_in_script_or_command() -> None:
    plan = plan_of(launch={"nodes": 1, "env": {"MY_TOKEN": "s3cret", "LEVEL": "4"}})
    assert "s3cret" not in script.render(plan) + json.dumps(plan.to_json())
    assert not any("--export" in text for text in plan.commands[0].argv)


@pytest.mark.parametrize("given", [{"run_id": "a\ntouch gone"}, {"comment": "a\n#SBATCH --x"}])
def test_a_line_break_in_a_flag_is_refused_wherever_it_came_from(given: dict[str, str]) -> None:
    """As of a run whose directory was renamed."""
    plan = replace(plan_of(FACTS), run_id=given.get("run_id", FACTS.run_id))
    options = SlurmOptions.of(plan.options).model_copy(update={"comment": given.get("comment")})
    plan = replace(plan, options=options)
    with pytest.raises(PlanError):
        script.render(plan)


def test_shellcheck_has_nothing_to_say() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    plan = plan_of(replace(FACTS, runs="/it's a (b); c"), modules=["a b"], setup=["true"])
    done = subprocess.run(
        ["shellcheck", "-"], input=script.render(plan), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.j2"
    packaged = (asset_dir("slurm") / "job.sbatch.j2").read_text()
    mine.write_text(packaged.replace("#!/bin/bash", "#!/bin/bash -l"))
    assert script.render(plan_of(template=str(mine))).startswith("#!/bin/bash -l\n")
    mine.write_text("{{ partition_of_mine }}")
    with raises("slurm.template-invalid", "mine.j2:1: ", "'partition_of_mine'"):
        script.render(plan_of(template=str(mine)))
    mine.write_text("one\n{% if %}")
    with raises("slurm.template-invalid", "mine.j2:2: "):
        script.render(plan_of(template=str(mine)))
    with raises("slurm.template-unreadable", "No such file"):
        script.render(plan_of(template=str(tmp_path / "none")))


@pytest.mark.parametrize(
    "expression",
    [
        "{{ cycler.__init__.__globals__.os.system('touch gone') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ 1 / 0 }}",
        "{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for a in range(99999) %}" + 100 * "x" + "{% endfor %}",
        "{% include 'other' %}",
    ],
)
def test_a_template_fills_in_and_does_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expression: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.j2").write_text(f"#!/bin/bash\n{expression}\n")
    with raises("slurm.template-invalid", "mine.j2") as refused:
        script.render(plan_of(template="mine.j2"))
    assert len(str(refused.value)) < 500
    assert not Path("gone").exists()


@pytest.mark.parametrize(
    ("options", "code", "names"),
    [
        ({"partion": "gpu"}, "option.unknown-field", ("option partion", "'partition'?")),
        ({"time": 90}, "option.invalid-value", ("option time", "90")),
        ({"time": "90"}, "option.invalid-value", ("option time", "'90'")),
        ({"slurm": {"partition": "x"}}, "slurm.flag-not-allowed", ("'partition'", "write part")),
        ({"slurm": {"ntasks": "4"}}, "slurm.flag-not-allowed", ("'ntasks'", "use --procs")),
        (
            {"slurm": {"test-only": True}},
            "slurm.flag-not-allowed",
            ("'test-only'", "use `dtrain plan`"),
        ),
        ({"slurm": {"wait": True}}, "slurm.flag-not-allowed", ("'wait'", "without --detach")),
        ({"slurm": {"a b": "4"}}, "slurm.flag-not-allowed", ("'a b'", "long name")),
    ],
)
def test_what_is_refused_in_options(
    options: dict[str, Any], code: str, names: tuple[str, ...]
) -> None:
    with raises(code, *names):
        plan_of(**options)


def test_an_elastic_job_takes_what_it_is_given() -> None:
    text = script.render(plan_of(launch={"nodes": "2:4"}))
    assert "#SBATCH --nodes=2-4\n" in text
    assert "#SBATCH --ntasks-per-node" not in text, "with which Slurm gives the fewest"
    assert '  --nodes="$SLURM_JOB_NUM_NODES" \\\n  --ntasks="$SLURM_JOB_NUM_NODES" \\\n' in text


def test_an_elastic_job_by_submitit_leaves_the_number_of_nodes_to_slurm() -> None:
    parameters = submitit.parameters([plan_of(launch={"nodes": "1:2"}, submit="submitit")])
    assert parameters["additional_parameters"]["nodes"] == "1-2"
    given = '"$SLURM_JOB_NUM_NODES"'
    assert parameters["setup"][-1] == f"export SLURM_NNODES={given} SLURM_NTASKS={given}"


def test_a_backslash_is_refused() -> None:
    with raises("slurm.path-not-usable", "\\", "--runs DIR"):
        plan_of(replace(FACTS, runs="/a\\b"))


def test_a_short_time_limit_leaves_the_workers_half_of_it() -> None:
    assert "#SBATCH --signal=USR2@60\n" in script.render(plan_of(time="2m"))
    assert "#SBATCH --signal=USR2@120\n" in script.render(plan_of(time="5m"))


PARTITIONS = """\
PartitionName=quick Default=NO MaxTime=00:30:00 State=UP
PartitionName=day Default=YES MaxTime=1-00:00:00 State=UP
PartitionName=ever Default=NO MaxTime=UNLIMITED State=UP
"""


@pytest.mark.parametrize(
    ("wanted", "asked", "given"),
    [
        ("quick", "4h", "0-00:30:00"),
        ("quick", "20m", "0-00:20:00"),
        ("quick,day", "40h", "1-00:00:00"),
        (None, "40h", "1-00:00:00"),
        ("day,ever", "40h", "1-16:00:00"),
        ("unknown", "40h", "1-16:00:00"),
    ],
)
def test_a_time_limit_above_that_of_the_partition_is_cut(
    monkeypatch: pytest.MonkeyPatch, wanted: str | None, asked: str, given: str
) -> None:
    launcher = SlurmLauncher()

    def facts(returncode: int) -> Facts:
        done = subprocess.CompletedProcess([], returncode, PARTITIONS, "away")
        monkeypatch.setattr(queue, "run_command", lambda *argv: done)
        queue._partitions.cache_clear()
        return launcher.survey(FACTS, SlurmOptions(partition=wanted, time=asked))

    plan = plan_of(facts(0), partition=wanted, time=asked)
    uncut = plan_of(partition=wanted, time=asked)
    assert plan.options.time == given
    assert bool(plan.notes) == (plan != uncut)
    assert facts(1) == FACTS
    queue._partitions.cache_clear()


def test_slurm_is_asked_for_limits_only_when_they_may_cut_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(queue, "run_command", lambda *argv: pytest.fail(f"asked {argv}"))
    for options in (SlurmOptions(), SlurmOptions(time="4h", requeue=0)):
        assert SlurmLauncher().survey(FACTS, options) == FACTS


ARRAY = """\
#!/bin/bash
# Runs it's-0 to it's-2 of dtrain: each has its own script.
#SBATCH --job-name="it's"
#SBATCH --comment="dtrain runs it's-0 to it's-2"
#SBATCH --array=0-2%2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --nice=100

exec '/runs/it'"'"'s-'"$SLURM_ARRAY_TASK_ID"/slurm/job.sbatch
"""


def test_the_script_of_an_array() -> None:
    plans = [plan_of(replace(FACTS, run_id=f"it's-{n}"), slurm={"nice": "100"}) for n in range(3)]
    _check_shared_flags(plans)
    assert Sbatch().render_array(plans, 2) == ARRAY
    assert "#SBATCH --array=0,2%2\n" in Sbatch().render_array([plans[0], plans[2]], 2)
    assert "#SBATCH --array=1-2\n" in Sbatch().render_array(plans[1:], None)
    with raises("slurm.array-differs", "--nice=100"):
        _check_shared_flags([*plans, plan_of()])


BY_SUBMITIT = """\
#!/bin/bash

# Parameters
#SBATCH --array=0-2%2
#SBATCH --comment='dtrain runs it'"'"'s-0 to it'"'"'s-2'
#SBATCH --cpus-per-task=1
#SBATCH --job-name='it'"'"'s'
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output='/runs/it'"'"'s-%a/slurm/job.log'
#SBATCH --requeue
#SBATCH --signal=USR2@120

# setup
set -e
# by hand
module load cuda
set +e

trap : TERM USR2 # the agents exit cleanly, and the shell waits for them
export SLURM_NNODES=2 SLURM_NTASKS=2

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output '/runs/it'"'"'s-0/slurm/%A_%a_%t_log.out' \
--ntasks-per-node=1 --cpus-per-task=1 --kill-on-bad-exit=1 --wait=40 /usr/bin/python3 -P -u -m \
submitit.core._submit '/runs/it'"'"'s-0/slurm'


# teardown
status=$?

# The first agent creates this file if the training is to continue in another attempt. If another
# node has failed, srun asks the first agent to exit too; then the job is not requeued.
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
if [ "$status" = 0 ] &&
  [ -e '/runs/it'"'"'s-'"$SLURM_ARRAY_TASK_ID"/slurm/requeue-"${SLURM_RESTART_COUNT:-0}" ] &&
  [ "$(squeue -h -j "$job" -o %T)" = RUNNING ]; then
  scontrol requeue "$job"
fi
exit "$status"
""".replace(" \\\n-", " -").replace(" \\\nsub", " sub")


def test_the_script_of_an_array_by_submitit() -> None:
    pytest.importorskip("submitit")
    setup = {"submit": "submitit", "setup": ["# by hand", "module load cuda"]}
    plans = [plan_of(replace(FACTS, run_id=f"it's-{n}"), **setup) for n in range(3)]
    _check_shared_flags(plans)
    assert Submitit().render_array(plans, 2) == BY_SUBMITIT.rstrip("\n")
    assert "#SBATCH --array=0-2%3\n" in Submitit().render_array(plans, None)
    assert "--array" not in Submitit().render_array(plans[:1], 2)  # submitit makes none of one
    with raises("slurm.array-of-some", "--at-once"):
        Submitit().submit_array(plans[1:], 2)
    slower = plan_of(launch={"nodes": 2, "stop_timeout": "50s"}, **setup)
    with raises("slurm.array-differs", "--wait=60, --wait=40"):
        _check_shared_flags([*plans, slower])


@pytest.mark.parametrize("runs", ["/100%j", "/one\ntwo"])
def test_a_path_that_submitit_cannot_use_is_refused(runs: str) -> None:
    pytest.importorskip("submitit")
    plan = plan_of(replace(FACTS, runs=runs), submit="submitit")
    with raises("slurm.path-not-usable", "submitit", "--runs DIR"):
        Submitit().render(plan)


def test_a_template_is_refused_with_submitit() -> None:
    with raises("option.invalid-value", "template", "submit: sbatch"):
        plan_of(submit="submitit", template="own.j2")


def test_a_flag_of_sbatch_that_is_given_twice_is_passed_on_twice() -> None:
    texts = ["slurm.nice=1", "slurm.exclusive", "slurm.gres-flags=a", "slurm.gres-flags=b"]
    found = parse_options(texts, SlurmOptions)["slurm"].plain()
    assert found == {"nice": 1, "exclusive": True, "gres-flags": ["a", "b"]}
    text = script.render(plan_of(slurm=found))
    assert "#SBATCH --nice=1\n#SBATCH --exclusive\n" in text
    assert "#SBATCH --gres-flags=a\n#SBATCH --gres-flags=b\n" in text


@pytest.mark.parametrize(
    ("texts", "places"),
    [
        (["mem=1G", "mem=2G"], ["-o mem"]),
        (["mem"], ["-o"]),
        (["=1", "slurm.=1", "mem={"], ["-o", "-o", "-o mem"]),
        (["modules={a: 1}"], []),
    ],
)
def test_options_that_cannot_be_read(texts: list[str], places: list[str]) -> None:
    try:
        parse_options(texts, SlurmOptions)
        found = []
    except JobError as error:
        found = [problem.file for problem in error.problems]
    assert found == places


def test_an_option_that_is_a_list_takes_one_value_or_several() -> None:
    one = parse_options(["modules=cuda", "setup=[a, b]"], SlurmOptions)
    assert {name: part.plain() for name, part in one.items()} == {
        "modules": ["cuda"],
        "setup": ["a", "b"],
    }
    two = parse_options(["modules=cuda", "modules=gcc", "cpus-per-node=4"], SlurmOptions)
    assert two["modules"].plain() == ["cuda", "gcc"]
    assert two["cpus_per_node"].plain() == 4


def test_time_as_slurm_writes_it() -> None:
    for written, limit in (("90m", "0-01:30:00"), ("30:00", "0-00:30:00"), ("2-00:00:00",) * 2):
        assert SlurmOptions(time=written).time == limit


def test_wrong_options_are_reported_with_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launchers").mkdir()
    (tmp_path / "launchers" / "site.yaml").write_text(
        "launcher: slurm\nextends: slurm\noptions:\n  partion: gpu\n  time: 90\n  account: 1234\n"
    )
    profile = load_profile("site", tmp_path)
    with pytest.raises(JobError) as caught:
        planning._options(
            base.load("slurm"), profile, Request(further_options=["slurm.nice=1"]), {}
        )
    assert_problems(
        caught.value.problems,
        ("option.unknown-field", "launchers/site.yaml:4:3: partion", "'partition'"),
        ("option.invalid-value", "launchers/site.yaml:5:9: time", "90m", "number 90"),
    )


@pytest.mark.parametrize(
    ("printed", "code", "reason", "place"),
    [
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition "
            "combination specified\n",
            "slurm.account-invalid",
            ": Invalid account or account/partition combination specified\n",
            "-p: partition: gpu",
        ),
        (
            "sbatch: error: Memory specification can not be satisfied\nsbatch: error: Batch job "
            "submission failed: Requested node configuration is not available\n",
            "slurm.memory-invalid",
            ": Memory specification can not be satisfied; Requested node configuration is not "
            "available\n",
            "launchers/site.yaml:7:8: mem: 900G",
        ),
        (
            "sbatch: error: Invalid --mem specification\n",
            "slurm.memory-invalid",
            ": Invalid --mem specification\n",
            "launchers/site.yaml:7:8: mem: 900G",
        ),
        (
            "sbatch: unrecognized option '--no-such=1'\n",
            "slurm.refused",
            ": unrecognized option '--no-such=1'\n",
            "-o slurm.no_such: 1",
        ),
        (
            "sbatch: error: Invalid node name specified\n",
            "slurm.node-name-invalid",
            ": Invalid node name specified\n",
            "-o slurm.nodelist: n9",
        ),
        ("", "slurm.refused", ": no reason", ""),
    ],
)
def test_a_refusal_has_slurms_words_and_the_place(
    printed: str, code: str, reason: str, place: str
) -> None:
    plan = plan_of(partition="gpu", mem="900G", slurm={"no_such": "1", "nodelist": "n9"})
    further = {"slurm.no_such": "-o slurm.no_such", "slurm.nodelist": "-o slurm.nodelist"}
    places = {"partition": "-p", "mem": "launchers/site.yaml:7:8", **further}
    plan = replace(plan, sources=places)
    error = sbatch.refusal(plan, printed)
    assert error.code == code
    assert_named(str(error), [reason])
    _, *places = str(error).split("\n  ")
    assert places == ([place] if place else [])
