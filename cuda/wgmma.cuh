// Joined in front of every kernel file, after mma.cuh: warp-group tensor instructions, bulk copies and barriers of sm_90a.
