"""Fill the generated parts of README and docs: `python docs/fill.py`.

A generated part is between `<!-- begin NAME -->` and `<!-- end NAME -->`. A test fails when a file
differs from the output of this script.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dtrain import catalog
from dtrain.cli.main import _COMMANDS
from dtrain.codes import CODES
from dtrain.doctor.diagnosis import CHECK_CODES
from dtrain.job.schema import job_schema
from dtrain.launchers.torchrun_options import ANSWERS

Problem = Callable[[str, int], str | None]
"""Why a strategy cannot run on a number of nodes; None if it can."""

ROOT = Path(__file__).resolve().parents[1]
FILES = (
    "README.md",
    "docs/doctor.md",
    "docs/errors.md",
    "docs/extending.md",
    "docs/job-file.md",
    "docs/same-training.md",
    "docs/script.md",
)


def main() -> None:
    """Rewrite the files that are out of date."""
    for name in FILES:
        path = ROOT / name
        before = path.read_text()
        after = filled(before)
        if after != before:
            path.write_text(after)
            print(f"rewrote {name}", file=sys.stderr)


def filled(text: str) -> str:
    """Return a document in which every generated part is current."""

    def part(match: re.Match[str]) -> str:
        return f"{match[1]}\n{PARTS[match[2]]()}\n{match[3]}"

    pattern = r"(<!-- begin ([\w-]+) -->)\n.*?(<!-- end \2 -->)"
    return re.sub(pattern, part, text, flags=re.DOTALL)


# -- README ------------------------------------------------------------------------------------


def example() -> str:
    """The job file and the task of the digits example, side by side."""
    folder = ROOT / "examples" / "digits"
    job, task = (folder / "job.yaml").read_text(), (folder / "task.py").read_text()
    return (
        "<table>\n"
        "<tr><th>examples/digits/job.yaml</th><th>examples/digits/task.py</th></tr>\n"
        f'<tr><td valign="top">\n\n```yaml\n{job}```\n\n</td>'
        f'<td valign="top">\n\n```python\n{task}```\n\n</td></tr>\n'
        "</table>"
    )


def matrix() -> str:
    """The table of trainers, strategies and launchers that work together."""
    rows = [("trainer", "launcher", *(f"`{name}`" for name in catalog.STRATEGIES))]
    for trainer in catalog.TRAINERS:
        cells = [cell(trainer, strategy) for strategy in catalog.STRATEGIES]
        rows += [(f"`{trainer}`", f"`{launcher}`", *cells) for launcher in catalog.LAUNCHERS]
        if trainer == "lightning":
            cells = [cell(trainer, each, catalog.own_loops_problem) for each in catalog.STRATEGIES]
            own = f"`{trainer}`, own loops"
            rows += [(own, f"`{launcher}`", *cells) for launcher in catalog.LAUNCHERS]
    return table(rows)


def cell(trainer: str, strategy: str, problem: Problem | None = None) -> str:
    """`yes`, `one node`, `its own` or `no`, from the catalog; the launcher makes no difference."""
    if trainer == catalog.SCRIPT:
        return "its own"
    problem = problem or functools.partial(catalog.pair_problem, trainer)
    if problem(strategy, 1) is not None:
        return "no"
    return "yes" if problem(strategy, 2) is None else "one node"


def refusals() -> str:
    """The planner's messages for all combinations that do not work."""
    trainers = [trainer for trainer in catalog.TRAINERS if trainer != catalog.SCRIPT]
    pairs = [(trainer, strategy) for trainer in trainers for strategy in catalog.STRATEGIES]
    said = [catalog.pair_problem(*pair, nodes) for nodes in (1, 2) for pair in pairs]
    said.append(catalog.own_loops_problem("exact"))
    said.append(catalog.pair_problem(catalog.SCRIPT, "ddp", 1))
    return "\n".join(f"- {text}" for text in dict.fromkeys(said) if text)


def strategies() -> str:
    """A list of the strategies, with a summary of each."""
    return "\n".join(f"- `{name}`: {fact.summary}" for name, fact in catalog.STRATEGIES.items())


def commands() -> str:
    """All commands, with their line of help."""
    return table(
        [("command", ""), *((f"`dtrain {name}`", text) for name, (_, text) in _COMMANDS.items())]
    )


# -- docs/errors.md ----------------------------------------------------------------------------

AREAS = {
    "usage": "The command line",
    "file": "Files",
    "yaml": "YAML",
    "job": "job.yaml and what it names",
    "profile": "Profiles",
    "option": "Options of a launcher",
    "plan": "What goes together",
    "launch": "The start of a launch",
    "run": "Runs",
    "torchrun": "Launcher torchrun",
    "slurm": "Launcher slurm",
    "ray": "Launcher ray",
    "url": "Runs at a URL",
    "node": "Nodes and workers",
    "gpu": "GPUs",
    "init": "dtrain init",
    "doctor": "dtrain doctor",
    "checkpoint": "Checkpoints",
    "failure": "Failures of a run",
    "verify": "dtrain verify",
    "export": "dtrain export",
    "api": "Calls from Python",
}
"""First part of a code → the title of its section; those of other areas come after these."""


def errors() -> str:
    """Every code with its cause and remedy, area by area."""
    areas = dict.fromkeys([*AREAS, *(code.partition(".")[0] for code in CODES)])
    parts = []
    for area in areas:
        rows = [("code", "what is wrong", "what to do")]
        for code, entry in CODES.items():
            if code.startswith(f"{area}."):
                rows.append((f'<a id="{code}"></a>`{code}`', entry.cause, entry.remedy))
        parts.append(f"## {AREAS.get(area, area.capitalize())}\n\n{table(rows)}")
    return "\n\n".join(parts)


# -- docs/doctor.md ----------------------------------------------------------------------------


def checks() -> str:
    """The checks of dtrain doctor, and what a problem of each is."""
    rows = [("check", "a warning or a problem", "what to do")]
    for name, code in CHECK_CODES.items():
        rows.append((f"`{name}`", CODES[code].cause, CODES[code].remedy))
    return table(rows)


# -- docs/extending.md -------------------------------------------------------------------------


def launcher() -> str:
    """The external launcher of the examples, with its entry points."""
    folder = ROOT / "examples" / "launcher"
    module, project = (folder / name for name in ("rsh_launcher.py", "pyproject.toml"))
    points = project.read_text()
    points = points[points.index("[project.entry-points") : points.index("[tool.")].rstrip()
    return f"```python\n{module.read_text()}```\n\n```toml\n{points}\n```"


# -- docs/job-file.md --------------------------------------------------------------------------


def fields() -> str:
    """Every field of job.yaml, section by section, from the JSON Schema."""
    schema = job_schema()
    required = [*schema["required"], *schema["oneOf"][0]["required"]]
    return "\n\n".join(section(schema, schema["properties"], required, ""))


def section(
    schema: Mapping[str, Any], properties: Mapping[str, Any], required: list[str], prefix: str
) -> Iterator[str]:
    """The table of one section, then those of the sections in it."""
    rows = [("field", "value", "default", "meaning")]
    inner = []
    for name, field in properties.items():
        model = submodel(schema, field)
        about = " ".join(field.get("description", (model or {}).get("description", "")).split())
        if model is not None:
            inner.append((f"{prefix}{name}", model, about))
            continue
        default = "**required**" if name in required else default_of(field)
        rows.append((f"`{prefix}{name}`", value_of(field), default, about))
    yield table(rows)
    for path, model, about in inner:
        yield f"### `{path}:`\n\n{about}"
        yield from section(schema, model["properties"], model.get("required", []), f"{path}.")


def submodel(schema: Mapping[str, Any], field: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section behind a field, if it is one."""
    for option in (field, *field.get("anyOf", []), *field.get("allOf", [])):
        if "$ref" in option:
            model: Mapping[str, Any] = schema["$defs"][option["$ref"].rpartition("/")[2]]
            return model
    return None


def value_of(field: Mapping[str, Any]) -> str:
    """Describe the values that a field accepts."""
    options = [each for each in field.get("anyOf", []) if each.get("type") != "null"]
    if len(options) > 1:
        if any("pattern" in each for each in options):
            return "a number, or `min:max`"
        return " or ".join(value_of(each) for each in options)
    if options:
        return value_of(options[0])
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return " ".join(f"`{name}`" for name in field["enum"])
    kind = field.get("type")
    if isinstance(kind, list):
        return "duration" if "90s" in field.get("examples", []) else "size"
    words = {"string": "text", "boolean": "`true` or `false`", "object": "`name: value` lines"}
    if kind == "array":
        return "list of text"
    if kind in words:
        return words[kind]
    return ("whole number" if kind == "integer" else "number") + bounds(field)


def bounds(field: Mapping[str, Any]) -> str:
    """The range of a number, for example `, 1 or more`."""
    if "exclusiveMinimum" in field:
        return f" above {field['exclusiveMinimum']:g}"
    return f", {field['minimum']:g} or more" if "minimum" in field else ""


def default_of(field: Mapping[str, Any]) -> str:
    """The value of a field that is left out."""
    value = field.get("default")
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return f"`{value[0]}`" if len(set(value)) == 1 else f"`{value[0]}:{value[1]}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return "-" if value is None else f"`{value}`"


def table(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; the first row is its head."""
    escaped = [[text.replace("|", "\\|") for text in row] for row in rows]
    escaped.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in escaped)


# -- docs/same-training.md ----------------------------------------------------------------------


def mistakes() -> str:
    """The mistakes that the tests make on purpose, by the rule that each breaks."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.mistakes import listed

    rows = [("rule", "mistakes")]
    return table([*rows, *((rule, " ".join(some)) for rule, some in listed())])


def torchrun() -> str:
    """The options of torchrun that dtrain answers, each with the answer."""
    rows = ["| torchrun | dtrain launch |", "| --- | --- |"]
    for name, answer in ANSWERS.items():
        instead = f"`{answer.instead.format('X')}`: " if answer.instead else ""
        rows.append(f"| `{name}` | {instead}{answer.why} |")
    return "\n".join(rows)


PARTS: Mapping[str, Callable[[], str]] = {
    "torchrun": torchrun,
    "example": example,
    "matrix": matrix,
    "refusals": refusals,
    "strategies": strategies,
    "commands": commands,
    "errors": errors,
    "checks": checks,
    "launcher": launcher,
    "fields": fields,
    "mistakes": mistakes,
}

if __name__ == "__main__":
    main()
