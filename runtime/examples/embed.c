/* Runs a compiled plan from C: `embed PLAN WEIGHTS ID...` prints the likeliest next id. Made in the root of the repository by

   cargo build --release -p pleach-runtime
   cc -I runtime/include runtime/examples/embed.c target/release/libpleach_runtime.a -lgcc_s -lpthread -ldl -lm -o embed
*/
#include "pleach.h"
#include <stdio.h>
#include <stdlib.h>

static int fail(void) {
    fprintf(stderr, "%s\n", pleach_last_error());
    return 1;
}

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: embed PLAN WEIGHTS ID...\n");
        return 2;
    }
    size_t n = (size_t)argc - 3;
    int32_t *ids = malloc(n * sizeof *ids);
    if (!ids) return 1;
    for (size_t i = 0; i < n; i++) ids[i] = atoi(argv[i + 3]);

    struct pleach_options options = {.tokens = n, .cache = n};
    struct pleach_session *s = pleach_open(argv[1], argv[2], &options);
    if (!s) return fail();
    size_t segments[2] = {0, n};
    const float *logits;
    uint64_t shape[8];
    if (pleach_infer(s, ids, segments, 1) || pleach_output(s, "logits", &logits, shape, NULL)) return fail();
    const float *row = logits + (n - 1) * shape[1];
    uint64_t best = 0;
    for (uint64_t i = 1; i < shape[1]; i++)
        if (row[i] > row[best]) best = i;
    printf("%llu\n", (unsigned long long)best);
    pleach_close(s);
    free(ids);
    return 0;
}
