/* Small parts as one file: to read what vectors include takes longer than to compile these. */
#include "draws.c"
#include "far.c"
#include "frame.c"
#include "trial.c"
