"""The report of a run: `report.html`, one self-contained page, and the table that ends a run in the terminal.

`write_report` reads the run folder; `render_report` is pure: plain data in, HTML out, the same bytes for the
same data. Whatever a run does not have (no fine-tuning, no re-slicing, a value that is not finite) becomes a
note on the page. Every string that comes from a file is escaped, and the page carries a content security
policy under which nothing can be loaded or executed.

numbers.py    formatting, the comparison table, the headline
figures.py    plots as inline SVG
markup.py     headings, tables, figures as HTML
sections.py   the parts of the page
page.py       the page and the files
"""

from vtp.report.numbers import comparison_rows, comparison_table
from vtp.report.page import read_metrics, render_report, write_report

__all__ = ["comparison_rows", "comparison_table", "read_metrics", "render_report", "write_report"]
