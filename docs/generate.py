"""The pages of the reference that are read off the program: `python -m docs.generate` writes them anew.

`reference/command-line.md` is what `--help` says of every command; `reference/sites.md` is what is found in a small
random model of each family; `reference/api/methods.md`, README's table of methods and `listing.json`, which `steerkit
methods` shows, are the files of `steerkit/methods`. `make docs` writes all, and tests compare them with what is there;
a method that is not yet in its pages breaks no test.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.models import OptionInfo

from steerkit.cli._data import PANEL as DATA
from steerkit.cli._data import DataChoice
from steerkit.cli._model import PANEL as MODEL
from steerkit.cli._model import ModelChoice
from steerkit.methods._listing import LISTING

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = Path(__file__).resolve().parent / "reference"

_COMMAND_LINE = """# Command line

`steerkit COMMAND --help` says the same. Results go to stdout, progress and warnings to stderr; `--json` makes an answer
machine-readable. Exit codes: 0 fine, 1 an error in one line (or a check that failed, or a calibration in which nothing
works), 2 wrong usage, 130 interrupted. `steerkit --debug COMMAND` shows the traceback of an error. `python -m steerkit`
is the same program.

This page is written by `python -m docs.generate`.

## Model options

Every command that loads a model has these, and the table `[model]` of a recipe the same keys; the command line comes
first. Which device was chosen is said on stderr: [devices](../how-to/devices.md).

{model}

## Data options

Commands that fit or measure on pairs take them from a file of yours: [your own data](../how-to/your-own-data.md).

{data}
"""

_HEAD = ("| | what | default |", "| --- | --- | --- |")
# Of a group of options the first is shown at a command; in the place of the others stands a link.
_SHOWN = ("model", "data")
_LINKED = {
    "device": "| [model options](#model-options) | Revision, device, precision, quantisation, ... |  |",
    "positive": "| [data options](#data-options) | Two files of prompts, columns, labels, what is held out, ... |  |",
}
_ANY = inspect.Parameter.POSITIONAL_OR_KEYWORD

_SITES = """# Sites by family

A *site* is a place in the network, `<kind>.<block>`, blocks counted from 0. The same site reads and writes: what was
fitted there is, bit for bit, the tensor that is edited there.

| kind | tensor |
| --- | --- |
{kinds}

Where these are in a given model is found by running a block over three tokens and checking
`resid_post = resid_pre + attn_out + mlp_out` on the numbers, never by the names of modules: `post_attention_layernorm`
is the norm before the MLP in Llama and the one after attention in Gemma. A kind that a family lacks is refused with the
reason; so is what passes between the blocks where that is not one stream `[b, t, d]`:
[limits](../explanation/limits.md).

The table is what is found in a small random model of each family: *yes*; *=* another kind's tensor, which then stands
for it; *some* in some blocks only (models that mix kinds of blocks); empty: refused.

{table}

This page is written by `python -m docs.generate`. Ask for your own model:

```python
import steerkit
from steerkit.network import Site, locate

model, _ = steerkit.load_model()
for site, tap in locate(model, [Site(12, "attn_out"), Site(12, "z")]).items():
    print(site, tap.name, tap.side, tap.width)
```

```text
attn_out.12 model.layers.12.self_attn output 576
z.12 model.layers.12.self_attn.o_proj input 576
```
"""


_METHODS = """# Methods

One file, one published method.

What each one departs from in its paper stands in its text. A method of your own:
[write a method](../../how-to/write-a-method.md).

This page is written by `python -m docs.generate`.
"""
METHODS_HEAD = ("| method | what | paper | fitted on | scope |", "| --- | --- | --- | --- | --- |")


def command_line() -> str:
    """The page of the command line, from the program itself."""
    from steerkit.cli import app

    parts = [_COMMAND_LINE.format(model=_group(ModelChoice), data=_group(DataChoice))]
    parts += [_command(f"steerkit {_name(one)}", one.callback) for one in app.registered_commands]
    for group in app.registered_groups:
        assert group.typer_instance is not None
        parts += [
            _command(f"steerkit {group.name} {_name(one)}", one.callback)
            for one in group.typer_instance.registered_commands
        ]
    return "\n".join(parts)


def _group(kind: type) -> str:
    """The table of a group of options."""
    hints = get_type_hints(kind, include_extras=True)
    rows = [_parameter(inspect.Parameter(name, _ANY, default=None), hint) for name, hint in hints.items()]
    return "\n".join([*_HEAD, *rows])


def _name(command: Any) -> str:
    return command.name or command.callback.__name__.replace("_", "-")


def _command(name: str, run: Any) -> str:
    """One command: what it does, its arguments and options."""
    lines = [f"## {name}", ""]
    lines += [_plain(part) + "\n" for part in (inspect.getdoc(run) or "").split("\n\n")]
    hints = get_type_hints(run, include_extras=True)
    rows = []
    for name, one in inspect.signature(run).parameters.items():
        panel = get_args(hints[name])[1].rich_help_panel
        if panel not in (MODEL, DATA) or name in _SHOWN:
            rows.append(_parameter(one, hints[name]))
        elif name in _LINKED:
            rows.append(_LINKED[name])
    if rows:
        lines += [*_HEAD, *rows, ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Help text on one line, as Markdown shows it to the letter."""
    return " ".join(text.split()).replace("<", "&lt;")


def _parameter(one: inspect.Parameter, hint: Any) -> str:
    """A row of the table of one command."""
    hint, info = get_args(hint)[:2]
    kinds = [kind for kind in (get_args(hint) or (hint,)) if kind is not type(None)]
    kind = kinds[0]
    kind = (get_args(kind) or (kind,))[0]
    if isinstance(kind, type) and issubclass(kind, Enum):
        shown = "\\|".join(str(member.value) for member in kind)
    else:
        shown = {str: "TEXT", int: "N", float: "X", Path: "FILE"}.get(kind, "TEXT")
    shown = info.metavar or shown
    if isinstance(info, OptionInfo):
        given = [text for text in (info.default, *(info.param_decls or ())) if isinstance(text, str)]
        names = [part for text in given for part in text.split("/")] or [f"--{one.name.replace('_', '-')}"]
        shown = ", ".join(names) + ("" if kind is bool else f" {shown}")
    text = _plain(info.help or "").replace("|", "\\|")
    required = one.default in (inspect.Parameter.empty, ...)
    text += " *Required.*" if required else ""
    default = getattr(one.default, "value", one.default)
    plain = required or default is None or isinstance(default, bool)
    return f"| `{shown}` | {text} | {'' if plain else f'`{default}`'} |"


def sites() -> str:
    """The page of sites, from small random models of all families that the tests know."""
    from steerkit.network.sites import KIND_HELP

    kinds = "\n".join(f"| `{kind}` | {text} |" for kind, text in KIND_HELP.items())
    return _SITES.format(kinds=kinds, table=_table())


def _table() -> str:
    from steerkit.network import anatomies, find_decoder
    from steerkit.network.sites import KINDS
    from tests.families import FAMILIES, FURTHER, build

    shown = [kind for kind in KINDS if not kind.startswith("resid_")]
    lines = ["| family | " + " | ".join(f"`{kind}`" for kind in shown) + " |", "| --- " * (len(shown) + 1) + "|"]
    for name in (*FAMILIES, *FURTHER):
        if name != "llama_peft":
            decoder = find_decoder(build(name))
            blocks = anatomies(decoder, set(range(decoder.num_layers)))
            lines.append(f"| {name} | " + " | ".join(_found(blocks, kind) for kind in shown) + " |")
    return "\n".join(lines)


def _found(anatomies: Any, kind: str) -> str:
    """Whether a kind of site exists in a model's blocks."""
    from steerkit.errors import SiteError

    found = []
    for block in anatomies.values():
        with contextlib.suppress(SiteError):
            found.append(block.find(kind).kind)
    if not found:
        return ""
    if set(found) != {kind}:
        return f"= {min(found)}"
    return "yes" if len(found) == len(anatomies) else "some"


def shipped_methods() -> list[str]:
    """Names of the methods whose files are in steerkit itself, sorted."""
    from steerkit.methods._registry import method_names, resolve

    return [name for name in method_names() if resolve(name).__module__ == f"steerkit.methods.{name}"]


def method_row(name: str) -> str:
    """A method's row in README, as its class states it."""
    from steerkit.methods._registry import resolve

    kind = resolve(name)
    return f"| `{name}` | {kind.title} | {kind.paper} | {kind.data} | `{kind().default_scope}` |"


def methods_table() -> str:
    """README's table of methods."""
    lines = [*METHODS_HEAD, *map(method_row, shipped_methods())]
    return "\n".join(lines) + "\n"


def method_section(name: str) -> str:
    """A method's part of the reference, which is the text of its file."""
    module = f".. automodule:: steerkit.methods.{name}\n   :members:\n   :show-inheritance:"
    return f"## {name}\n\n```{{eval-rst}}\n{module}\n```\n"


def methods() -> str:
    """The page of methods."""
    return "\n".join([_METHODS, *map(method_section, shipped_methods())])


def schema() -> str:
    """The schema of compositions, as it stands in the package."""
    return (ROOT / "steerkit" / "composition" / "schema.json").read_text("utf-8")


def methods_listing() -> str:
    """What the shipped methods say of themselves, for commands that load none."""
    from steerkit.methods._listing import MethodFacts
    from steerkit.methods._registry import resolve

    return json.dumps([MethodFacts.of(resolve(name)).as_json() for name in shipped_methods()], indent=2) + "\n"


PAGES = {
    "command-line.md": command_line,
    "sites.md": sites,
    "api/methods.md": methods,
    "composition.schema.json": schema,
}


def main() -> None:
    """Write the pages, and README's table."""
    from tests.readme import put

    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")
    put("methods", methods_table())
    LISTING.write_text(methods_listing(), encoding="utf-8")


if __name__ == "__main__":
    main()
