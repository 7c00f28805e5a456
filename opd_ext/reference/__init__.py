# SPDX-License-Identifier: Apache-2.0
"""The reference pages, ``docs/reference/{settings,metrics}.md``: made from the sources, never written by hand.

``python -m opd_ext.reference`` in a checkout writes them anew, and the tables of costs in the recipes' guides. For the
pages only sources and dataclasses are read; neither verl nor vLLM is imported.
"""
