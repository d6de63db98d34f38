#include "far.h"

#include "vector.h"

void ss_store_far(void *to, const void *from, int64_t bytes) {
    char *out = to;
    const char *p = from;
#if SS_LANES >= 8
    enum { SIZE = 4 * SS_LANES };
    const int64_t until = -(uintptr_t)out & (SIZE - 1), head = until < bytes ? until : bytes;
    memcpy(out, p, head);
    for (out += head, p += head, bytes -= head; bytes >= SIZE; out += SIZE, p += SIZE, bytes -= SIZE)
#if SS_LANES == 16
        _mm512_stream_si512((void *)out, _mm512_loadu_si512(p));
#else
        _mm256_stream_si256((void *)out, _mm256_loadu_si256((const void *)p));
#endif
#endif
    memcpy(out, p, bytes);
}
