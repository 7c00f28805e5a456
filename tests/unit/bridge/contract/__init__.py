# SPDX-License-Identifier: Apache-2.0
"""What `opd_ext/bridge` relies on in verl, vLLM, Ray and TransferQueue: one named contract per seam.

A contract pins signatures and runs the one behaviour that the bridge needs, on the library's own code. When a new
version breaks one, the test of that name fails and says which file of `bridge/` to look at.
"""

import os

os.environ["VERL_PLATFORM"] = "cpu"  # before verl settles its platform in this process
