"""Products of codes of 8 and 4 bits by code made at run time, for AVX512-VNNI and AVX512-BF16.

Inputs become fixed-point numbers of 16 bits, one step a row, kept as two planes of signed bytes,
`256 * high + low`, which `vpdpbusd` multiplies by unsigned codes as they are stored. Where inputs
are meant to be rounded to int8, there is one plane.

Two planes leave each input off by half a step at most, 1 / 65024 of its row's largest magnitude.
The bound is relative to the row, not to the input: inputs above about 1 / 127 of the largest are
kept better than a rounding to bf16 would (1 / 512 of themselves), smaller ones worse, down to
nothing. In rows without outliers that is little beside the rounding of the result. It is not
where one input is far above all others and its weights are small: with one input 3000 times the
rest, and weights of 0 for it, results were off by 2.8 %, those of a bf16 product by 0.24 %.

Layouts, with 16 output rows a block:
- codes of 8 bits: [block][columns / 4][16 rows][4], unsigned;
- codes of 4 bits: [block][columns / 8][16 rows][4], the first four columns in the low halves;
- codes of fp8: [block][columns / 2][16 rows][2], widened to bf16 and multiplied by bf16 inputs;
- scales and zeros: [block][group][16 rows];
- inputs: [row][plane][columns], and their sums over each group: [row][group] fp32.

A row's result is computed in one order whatever rows stand beside it: no tiling is needed for
results that do not depend on the batch.
"""
