# SPDX-License-Identifier: Apache-2.0
"""The second level of the miniature world: long chains of dependent steps, in which methods can differ.

Problems, authors, grader and models are its own; tokenizer mechanics, pre-training, build and card are those of the
first level. Like that one, this package imports nothing by itself.
"""
