/* Matrix products: what generated code and gemm.c agree on. */
#pragma once
#include <stdint.h>

typedef enum { SS_F32, SS_BF16, SS_I8 } ss_type;

/* One block of a finished product: `rows` x `cols` f32 at `tile`, `stride` floats a row, which is
 * C[row.., col..] of matrix number `batch`; of i8, the bits of i32. */
typedef void (*ss_finish)(void *const *b, int64_t batch, int64_t row, int64_t col, int64_t rows,
                          int64_t cols, const float *tile, int64_t stride);

/* What the groups of a product are, which end at `ends[0] <= ends[1] <= ...`: rows of A and C, each
 * group with a matrix of B to itself (rows behind the last group are 0); or stretches of the summed
 * dimension, each with a matrix of C to itself. */
typedef enum { SS_UNGROUPED, SS_GROUPS_OF_ROWS, SS_GROUPS_OF_SUM } ss_grouping;

/* A dimension that several strides walk, outermost first: element i is where the digits of i lead.
 * Digits that are not used come first and have size 1. */
enum { SS_DIGITS = 4 };
typedef struct {
    int64_t size[SS_DIGITS], stride[SS_DIGITS];
} ss_digits;

/* Images as the left side, and weights as the right one. Row (image, place) of A is the window there:
 * element (channel, tap) is `channel + a_tap[tap]` from where `rows` leads, in images whose channels
 * are neighbours in memory, with a zero behind an odd number of bf16. That of column j of B is at
 * `channel * b_row + b_tap[tap] + j * b_col`. C is handed over turned: its rows are the columns of B,
 * its columns the places of one image, and images are its matrices. */
typedef struct {
    int64_t channels, taps;
    const int64_t *a_tap, *b_tap;       /* the latter ascend */
    ss_digits rows;
    int64_t places;                     /* of an image */
} ss_windows;

/* Columns of B in another order than those of C, which has `all` of them: the first matrix of the
 * batch has the first `each`, the next those behind them. Column j of C is column `at[j]` of B. */
typedef struct {
    ss_digits at;
    int64_t each, all;
} ss_order;

/* C[m,n] = A[m,k] B[k,n], `batch` times. Strides count elements. */
typedef struct {
    int64_t batch, m, n, k;
    ss_type type;                       /* of A and B; products are summed in f32, of i8 in i32 */
    int64_t a_batch, a_row, a_col;
    int64_t b_batch, b_row, b_col;
    ss_finish finish;                   /* stores a block of C */
    ss_grouping grouping;
    int64_t groups;
    const ss_digits *a_sum;             /* instead of a_col, or 0 */
    const ss_digits *b_sum, *b_cols;    /* instead of b_row and b_col, or 0 */
    const ss_windows *windows;          /* instead of strides of A, or 0 */
    const ss_order *order;              /* of one left side with many right ones, or 0 */
    int b_packed;                       /* whether B is as `ss_gemm_pack` wrote it */
    int b_rounded;                      /* whether weights are f32, rounded to bf16 while they are packed */
} ss_gemm;

/* Bytes of scratch that each thread needs. */
int64_t ss_gemm_scratch(const ss_gemm *g);

/* The product, block by block to `finish`; `threads` is how many the scratch is for. `ends` has
 * `groups` numbers; ends beyond what they divide count as its size. */
void ss_gemm_run(const ss_gemm *g, const void *a, const void *b, const int32_t *ends,
                 void *const *buffers, void *scratch, int64_t threads);

/* B of one product in the order in which the product reads it, for many that share it. */
void ss_gemm_pack(const ss_gemm *g, const void *b, void *packed);

/* Images in frames of zeros: `size[0]` x `size[1]` images, of each the first `size[2..4]` elements, at
 * `before` in a row-major image of `framed` elements. */
typedef struct {
    int64_t itemsize;
    int64_t size[5], stride[5];         /* of what is copied; strides count elements */
    int64_t before[3], framed[3];
} ss_frame;

void ss_frame_run(const ss_frame *f, const void *x, void *out);

/* The same, with the channels of each place side by side, as `ss_windows` takes them. */
void ss_frame_by_place(const ss_frame *f, const void *x, void *out);
