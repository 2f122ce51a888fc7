/* Kernels of the toy decoder the tests run; see mod.rs for what each computes. D is the width. */
#include <stdint.h>
#include <string.h>
#define D 8
#define R 2
#define V 37
enum { T, S, S1, C, P };
typedef uint8_t u8;

/* head [V,D] -> packed [D,V]; one task per row of the result. */
void transpose(u8 *const *b, const int64_t *n, int64_t first, int64_t last, u8 *scratch) {
    const float *w = (const float *)b[0];
    float *y = (float *)b[1];
    for (int64_t k = first; k < last; k++)
        for (int j = 0; j < V; j++) y[k * V + j] = w[j * D + k];
}
/* position table [P]: 1 + i / 16. */
void table(u8 *const *b, const int64_t *n, int64_t first, int64_t last, u8 *scratch) {
    float *y = (float *)b[0];
    for (int64_t i = first; i < last; i++) y[i] = 1.0f + (float)i / 16.0f;
}
/* packed [D,V], A [R,D], B [V,R], scale [] -> merged [D,V]. */
void merge(u8 *const *b, const int64_t *n, int64_t first, int64_t last, u8 *scratch) {
    const float *w = (const float *)b[0], *A = (const float *)b[1], *B = (const float *)b[2];
    const float s = *(const float *)b[3];
    float *y = (float *)b[4];
    for (int64_t k = first; k < last; k++)
        for (int j = 0; j < V; j++) {
            float x = 0;
            for (int r = 0; r < R; r++) x += A[r * D + k] * B[j * R + r];
            y[k * V + j] = w[k * V + j] + s * x;
        }
}
/* emb [V,D], ids [T], positions [T], table [P] -> h [T,D]; one task per token. */
void embed(u8 *const *b, const int64_t *n, int64_t first, int64_t last, u8 *scratch) {
    const float *e = (const float *)b[0], *t = (const float *)b[3];
    const int32_t *ids = (const int32_t *)b[1], *pos = (const int32_t *)b[2];
    float *y = (float *)b[4];
    for (int64_t i = first; i < last; i++)
        for (int k = 0; k < D; k++) y[i * D + k] = e[ids[i] * D + k] * t[pos[i]];
}
/* keys, h [T,D], q_segments [S1], kv_start [S], kv_len [S] -> m [T,D]: mean of the keys a token sees; task = token. */
void mean(u8 *const *b, const int64_t *n, int64_t first, int64_t last, u8 *scratch) {
    const float *keys = (const float *)b[0];
    const int32_t *seg = (const int32_t *)b[1], *start = (const int32_t *)b[2], *len = (const int32_t *)b[3];
    float *y = (float *)b[4];
    for (int64_t i = first; i < last; i++) {
        int64_t s = 0;
        while (seg[s + 1] <= i) s++;
        int64_t seen = len[s] - (seg[s + 1] - i) + 1;
        for (int k = 0; k < D; k++) {
            float x = 0;
            for (int64_t j = 0; j < seen; j++) x += keys[(start[s] + j) * D + k];
            y[i * D + k] = x / (float)seen;
        }
    }
}
/* cache [C,D] in place, h [T,D], slots [T]; task = token. */
void append(u8 *const *b, const int64_t *n, int64_t first, int64_t last, u8 *scratch) {
    const float *h = (const float *)b[1];
    const int32_t *slots = (const int32_t *)b[2];
    float *y = (float *)b[3];
    for (int64_t i = first; i < last; i++) memcpy(y + slots[i] * D, h + i * D, D * sizeof(float));
}
/* m [T,D], last [S] -> [S,D]; task = sequence. */
void rows(u8 *const *b, const int64_t *n, int64_t first, int64_t last, u8 *scratch) {
    const float *m = (const float *)b[0];
    const int32_t *at = (const int32_t *)b[1];
    float *y = (float *)b[2];
    for (int64_t i = first; i < last; i++) memcpy(y + i * D, m + at[i] * D, D * sizeof(float));
}
static void logits(u8 *const *b, int64_t first, int64_t last, u8 *scratch) {
    const float *x = (const float *)b[0], *w = (const float *)b[1];
    float *y = (float *)b[2], *acc = (float *)scratch;
    for (int64_t i = first; i < last; i++) {
        memset(acc, 0, V * sizeof(float));
        for (int k = 0; k < D; k++)
            for (int j = 0; j < V; j++) acc[j] += x[i * D + k] * w[k * V + j];
        memcpy(y + i * V, acc, V * sizeof(float));
    }
}
/* x [T,D] or [S,D], w [D,V] -> [.., V]; task = row, sums in scratch. */
void logits_t(u8 *const *b, const int64_t *n, int64_t first, int64_t last, u8 *scratch) { logits(b, first, last, scratch); }
void logits_s(u8 *const *b, const int64_t *n, int64_t first, int64_t last, u8 *scratch) { logits(b, first, last, scratch); }

/* Blocks of 32 values: f16 scale, signed bytes (ggml's Q8_0); rows of two blocks. */
static float half(const u8 *p) {
    union { uint32_t u; float f; } x;
    uint32_t h = p[0] | p[1] << 8;
    x.u = (h & 0x8000u) << 16 | (((h >> 10 & 31) + 112) << 23) | (h & 1023) << 13;
    return x.f;
}
/* blocks [N, 2 blocks] -> [N, 64]; one task per row. */
void unpack(u8 *const *b, const int64_t *n, int64_t first, int64_t last, u8 *scratch) {
    float *y = (float *)b[1];
    for (int64_t i = first; i < last; i++)
        for (int j = 0; j < 64; j++) {
            const u8 *block = b[0] + (i * 2 + j / 32) * 34;
            y[i * 64 + j] = (float)(int8_t)block[2 + j % 32] * half(block);
        }
}
/* [N, 64] -> the same; one task per row. */
void copy(u8 *const *b, const int64_t *n, int64_t first, int64_t last, u8 *scratch) {
    memcpy(b[1] + first * 256, b[0] + first * 256, (last - first) * 256);
}
