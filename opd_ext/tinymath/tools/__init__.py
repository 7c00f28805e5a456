# SPDX-License-Identifier: Apache-2.0
"""The level of several turns: bills of a shop, made out with a price list and a calculator that only tools can read.

Imports nothing, because reward workers load modules through it.
"""
