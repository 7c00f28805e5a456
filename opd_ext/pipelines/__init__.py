# SPDX-License-Identifier: Apache-2.0
"""Methods that are pipelines around fine-tuning: SSD and T3S.

A pipeline is a list of stages (:mod:`~opd_ext.pipelines.stages`), each of which turns files into files and is skipped
when its files are there. Two things happen in processes of their own: vLLM samples (:mod:`~opd_ext.bridge.sampler`)
and verl's SFT trainer fine-tunes (:mod:`opd_ext.bridge.finetune`). Everything between them is token tables
(:mod:`~opd_ext.tokens.tables`): ids are made once and never decoded and encoded again.
"""
