"""Products of codes of 8 and 4 bits by code made at run time, for AVX512-VNNI and AVX512-BF16.

Inputs become fixed-point numbers of 16 bits, one step a row, kept as two planes of signed bytes,
`256 * high + low`, which `vpdpbusd` multiplies by unsigned codes as they are stored. That is as
exact as bf16 beside a row's largest value, so the only rounding of note is that of the result.
Where inputs are meant to be rounded to int8, there is one plane.

Layouts, with 16 output rows a block:
- codes of 8 bits: [block][columns / 4][16 rows][4], unsigned;
- codes of 4 bits: [block][columns / 8][16 rows][4], the first four columns in the low halves;
- codes of fp8: [block][columns / 2][16 rows][2], widened to bf16 and multiplied by bf16 inputs;
- scales and zeros: [block][group][16 rows];
- inputs: [row][plane][columns], and their sums over each group: [row][group] fp32.

A row's result is computed in one order whatever rows stand beside it: no tiling is needed for
results that do not depend on the batch.
"""
