# SPDX-License-Identifier: Apache-2.0
"""Loss and norm of the gradient of one batch under many objectives, as the dense reference gave them in float64.

The reference (tests/stack/dense_reference.py) uses neither verl nor this package, so no version of either may move
them. The updates are those of tests/stack/engine_cases.py; torch's generator makes models and rollouts.
"""

FROZEN = {
    "reverse_kl": (0.7889874119034925, 1.6408116488624178),
    "forward_kl": (0.7841845397460583, 1.4266309730809592),
    "jsd": (0.13855706235741785, 0.22823146919039525),
    "temperature": (0.2078210446440797, 0.3825516668260698),
    "some taught": (0.6477160102098976, 1.4043528241737449),
    "some taught, by sequence": (0.7023986044004094, 1.8761835255543569),
    "only the taught count": (0.9204385408245911, 1.9956592879915298),
    "position credit": (1.0432071053743268, 2.1605015909127006),
    "surrogate": (0.04337739400004639, 1.0504549127712632),
    "surrogate off-policy": (1.2547550927253464, 0.05522946506061947),
    "other tokens": (-0.25163747042165546, 12.645182175796661),
    "other tokens off-policy": (3.301127956575446, 6.95815639745139),
    "other tokens beside a policy": (1.2413934748213453, 4.8586505319259174),
    "warm surrogate": (0.36711904125056855, 9.661457732762653),
    "capped": (0.04815578959820986, 0.16441215888285857),
    "spans": (0.11715472824237397, 0.2873877397633957),
    "clipped spans": (0.19746314112291244, 0.46206925012921807),
    "key spans": (0.2805405184382362, 0.8556973075670471),
    "mixed": (1.0404061863543947, 3.878124648960623),
    "gated spans": (0.8535295463303063, 1.5393785194504916),
    "spans beside a policy": (1.1708924657373614, 3.840065212638759),
    "policy for the untaught": (1.1357318288425502, 2.211565253163055),
    "shaped": (1.0137176155699137, 3.609460332572683),
    "trust region": (0.6169920867666434, 1.4905813165437978),
    "external": (1.2671712231340793, 1.2597771976110976),
    "taller student": (1.3274085568267984, 1.974732232712155),
    "taller student and a policy": (2.0892804679235293, 3.305750249290226),
}
