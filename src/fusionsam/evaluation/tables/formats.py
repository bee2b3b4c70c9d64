"""One table in three forms: Markdown for people, LaTeX for papers, CSV for programs. All show the same digits."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from fusionsam.io import write_text

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "±": r"$\pm$", "|": r"\textbar{}",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of a table; `group` heads the lines that may be compared with one another."""

    group: str
    cells: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass
class Table:
    """Columns, rows in groups, and what must be said of the whole; `name` is its file name without ending."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def footnotes(self) -> list[str]:
        """The rows' notes, each once, in order; their numbers in the table start at 1."""
        return list(dict.fromkeys(note for row in self.rows for note in row.notes))

    def groups(self) -> Iterator[tuple[str, list[Row]]]:
        """Heading and rows, in order."""
        for heading, rows in groupby(self.rows, key=lambda row: row.group):
            yield heading, list(rows)

    def marked(self, row: Row) -> tuple[str, ...]:
        """The row's cells, the first with the numbers of its footnotes."""
        known = self.footnotes()
        marks = "".join(f" [{known.index(note) + 1}]" for note in row.notes)
        return (row.cells[0] + marks, *row.cells[1:])


def drop_empty(table: Table, columns: tuple[str, ...]) -> Table:
    """The table without those of `columns` in which no row has a value."""
    empty = [
        i for i, name in enumerate(table.columns) if name in columns and all(r.cells[i] == "-" for r in table.rows)
    ]
    kept = [i for i in range(len(table.columns)) if i not in empty]
    rows = [Row(row.group, tuple(row.cells[i] for i in kept), row.notes) for row in table.rows]
    return Table(table.name, table.title, tuple(table.columns[i] for i in kept), rows, table.notes)


def to_markdown(table: Table) -> str:
    """A heading, the table with a bold line for each group, its notes."""

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    blank = ("",) * (len(table.columns) - 1)
    lines = [f"## {table.title}", "", line(table.columns), "|---|" + "---:|" * len(blank)]
    for heading, rows in table.groups():
        lines += [line((f"**{heading}**", *blank)), *(line(table.marked(row)) for row in rows)]
    notes = [f"[{number}] {note}" for number, note in enumerate(table.footnotes(), 1)]
    for note in (*notes, *table.notes):
        lines += ["", note]
    return "\n".join(lines) + "\n"


def latex_escape(text: str) -> str:
    """Text with every character that LaTeX reads as a command made harmless."""
    return "".join(_LATEX.get(character, character) for character in text)


def to_latex(table: Table) -> str:
    """A `table*` for \\input; needs the packages booktabs and graphicx."""

    def line(cells: tuple[str, ...]) -> str:
        return " & ".join(map(latex_escape, cells)) + r" \\"

    count = len(table.columns)
    lines = [
        "% needs \\usepackage{booktabs,graphicx}",
        r"\begin{table*}",
        r"\centering\footnotesize",
        rf"\caption{{{latex_escape(table.title)}}}",
        rf"\label{{tab:{table.name.replace('_', '-')}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (count - 1)}}}",
        r"\toprule",
        line(table.columns),
    ]
    for heading, rows in table.groups():
        lines += [r"\midrule", rf"\multicolumn{{{count}}}{{l}}{{\textit{{{latex_escape(heading)}}}}} \\"]
        lines += [line(table.marked(row)) for row in rows]
    lines += [r"\bottomrule", r"\end{tabular}}"]
    notes = [f"[{number}] {note}" for number, note in enumerate(table.footnotes(), 1)]
    lines += [rf"\par\smallskip\raggedright {latex_escape(note)}" for note in (*notes, *table.notes)]
    return "\n".join([*lines, r"\end{table*}"]) + "\n"


def to_csv(table: Table) -> str:
    """A header and the rows, with the columns `group` before and `note` behind; '-' stands for no value."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["group", *table.columns, "note"])
    writer.writerows([row.group, *row.cells, " ".join(row.notes)] for row in table.rows)
    return file.getvalue()


def write_table(table: Table, out: Path) -> list[Path]:
    """NAME.md, NAME.tex and NAME.csv in `out`."""
    forms = {".md": to_markdown, ".tex": to_latex, ".csv": to_csv}
    return [write_text(out / f"{table.name}{ending}", form(table)) for ending, form in forms.items()]
