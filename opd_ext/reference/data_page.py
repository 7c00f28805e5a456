# SPDX-License-Identifier: Apache-2.0
"""The tables of ``docs/data.md``, made of :mod:`opd_ext.data.catalogue`; the words around them are written by hand."""

import re

from opd_ext.data.listing import markdown


def with_tables(text: str) -> str:
    """The page, with everything between ``<!-- NAME: written by ... -->`` and ``<!-- end of NAME -->`` anew."""
    for name, table in markdown().items():
        begin, end = f"<!-- {name}: written by python -m opd_ext.reference -->", f"<!-- end of {name} -->"
        between = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        text = between.sub(lambda _, made=f"{begin}\n{table}\n{end}": made, text)
    return text
