"""`dtrain launchers`: launchers, their profiles, and the options of each."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from dtrain.cli import completers
from dtrain.cli import options as shared

if TYPE_CHECKING:
    from dtrain.launchers.listing import ProfileListing, Setting


@click.command(
    "launchers",
    cls=shared.Command,
    examples=(
        ("dtrain launchers", "All launchers and profiles."),
        ("dtrain launchers slurm", "The options of launcher slurm."),
    ),
)
@click.argument("name", required=False, shell_complete=completers.profiles)
@shared.json_option
def command(name: str | None, as_json: bool) -> None:
    """List launchers and profiles; of NAME, every option, its value and where it is set."""
    from dtrain.launchers import listing

    if name is None:
        found = listing.profiles()
        if as_json:
            shared.print_json([asdict(each) for each in found])
        else:
            click.echo(_table(found))
        return
    about, settings = listing.settings(name)
    if as_json:
        shared.print_json({**asdict(about), "settings": [asdict(each) for each in settings]})
    else:
        click.echo(_described(about, settings))


def _table(profiles: list[ProfileListing]) -> str:
    formatter = _formatter()
    with formatter.section("Profiles, for --launcher NAME"):
        formatter.write_dl([(each.name, _about(each)) for each in profiles])
    return formatter.getvalue().rstrip("\n")


def _about(profile: ProfileListing) -> str:
    about = profile.description or (profile.launcher and f"launcher {profile.launcher}")
    file = f"[{profile.file}]" if profile.file else ""
    return " ".join(filter(None, [about, file, profile.problem]))


def _described(profile: ProfileListing, settings: list[Setting]) -> str:
    formatter = _formatter()
    formatter.write_text(f"{profile.name}: {_about(profile)}")
    titles = {
        "launch": "Sizes and times, set by --set launch.NAME=VALUE",
        "options": f"Options of launcher {profile.launcher}, set by -o NAME=VALUE",
    }
    for section, title in titles.items():
        rows = [(_term(each), _definition(each)) for each in settings if each.section == section]
        if rows:
            with formatter.section(title):
                formatter.write_dl(rows)
    return formatter.getvalue().rstrip("\n")


def _term(setting: Setting) -> str:
    return ", ".join([setting.name, *setting.flags[:1]])


def _definition(setting: Setting) -> str:
    source = "" if setting.source == "default" else f"; {setting.source}"
    return f"{setting.help}  [{setting.kind}; {setting.value}{source}]"


def _formatter() -> click.HelpFormatter:
    from shutil import get_terminal_size

    return click.HelpFormatter(width=min(get_terminal_size().columns, 100) - 2)
