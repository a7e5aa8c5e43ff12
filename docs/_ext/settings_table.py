"""The directive `settings-table`: the fields of a settings class as a table, made from the class itself.

    ```{settings-table} instruct_trl.trainers.ppo_ptx.PPOPtxConfig
    ```

So a setting is explained in one place, its `help`, which `--help` prints and this table shows.
"""

from dataclasses import MISSING, Field, fields
from importlib import import_module

from docutils import nodes
from docutils.parsers.rst import Directive


def own_fields(kind: type) -> list[Field]:
    """Fields that the class declares itself: its own settings, and inherited ones with another default."""
    declared = kind.__dict__.get("__annotations__", {})
    return [field for field in fields(kind) if field.init and field.name in declared]


def default_of(field: Field) -> str:
    """The default as a user would write it in a YAML; the factory's value where there is one."""
    if field.default is not MISSING:
        value = field.default
    elif field.default_factory is not MISSING:
        value = field.default_factory()
    else:
        return "required"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class SettingsTable(Directive):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        kind = getattr(import_module(module), name)
        group = nodes.tgroup(cols=3)
        group += [nodes.colspec(colwidth=width) for width in (22, 14, 64)]
        group += nodes.thead("", self.row("Setting", "Default", "Meaning", code=False))
        body = nodes.tbody()
        for field in own_fields(kind):
            text = field.metadata.get("help")
            if not text:
                raise self.error(f"{self.arguments[0]}.{field.name} has no help text, which this table shows.")
            body += self.row(field.name, default_of(field), " ".join(text.replace("%%", "%").split()))
        group += body
        return [nodes.table("", group, classes=["settings"])]

    def row(self, *cells: str, code: bool = True) -> nodes.row:
        row = nodes.row()
        for index, cell in enumerate(cells):
            inner = nodes.literal(cell, cell) if code and index < 2 else nodes.Text(cell)
            row += nodes.entry("", nodes.paragraph("", "", inner))
        return row


def setup(app) -> dict:
    app.add_directive("settings-table", SettingsTable)
    return {"parallel_read_safe": True}
