# SPDX-License-Identifier: Apache-2.0
"""A composed configuration and a real model, as contracts have them."""

from tests.unit.bridge.contract.conftest import _composed, config, model  # noqa: F401
