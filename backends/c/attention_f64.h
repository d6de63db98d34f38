/* The calls of attention.h where `kind` is SS_ELEM_F64. */
#pragma once
#include "attention.h"

void ss_attention_forward_f64(const ss_attention *s, void *const *b, void *scratch, int64_t threads);
void ss_attention_backward_f64(const ss_attention *s, void *const *b, void *scratch, int64_t threads);
