# SPDX-License-Identifier: Apache-2.0
"""Write the reference pages anew, the tables of data sets, and the tables of costs in the recipes' guides."""

from opd_ext.files import write_whole
from opd_ext.reference import data_page, metrics_page, settings_page
from opd_ext.reference.fields import PACKAGE

FOLDER = PACKAGE.parent / "docs" / "reference"
PAGES = {"settings.md": settings_page.page, "metrics.md": metrics_page.page}


def main() -> None:
    """Write every page of :data:`PAGES`, and every table of data sets and of costs, into the checkout."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        write_whole(FOLDER / name, page().encode())
        print(f"written: {FOLDER / name}")
    page = PACKAGE.parent / "docs" / "data.md"
    write_whole(page, data_page.with_tables(page.read_text()).encode())
    print(f"written: {page}")
    from opd_ext.reference import costs  # which composes configurations: the pages above need no framework

    for guide in sorted(PACKAGE.parent.glob("recipes/*/README.md")):
        if (text := costs.with_costs(guide)) is not None:
            write_whole(guide, text.encode())
            print(f"written: {guide}")


if __name__ == "__main__":
    main()
