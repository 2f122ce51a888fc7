/* The C interface of pleach. Generated from runtime/src/capi.rs; a test checks that it is current. */

#ifndef PLEACH_H
#define PLEACH_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

// A plan with its weights, ready to run. Use it from one thread at a time.
struct pleach_session;

// What a session is opened with. Zero means the default.
struct pleach_options {
  // Workers; default one per core.
  uint32_t threads;
  // Tokens of a run; default 512.
  uint64_t tokens;
  // Sequences of a run; default 1.
  uint64_t sequences;
  // Slots of the key/value cache; default 2048.
  uint64_t cache;
  // Positions; default what the model was made for.
  uint64_t positions;
};

// An input of a run: `i32` or `f32` values, the other null.
struct pleach_input {
  // Name of the input.
  const char *name;
  // Integer values, or null.
  const int32_t *i32_values;
  // Float values, or null.
  const float *f32_values;
  // Number of values.
  size_t len;
};

// How to generate.
struct pleach_sampling {
  // New ids at most.
  size_t max_new_tokens;
  // 0 is greedy.
  float temperature;
  // Nucleus; 0 means 1.
  float top_p;
  // Key of the random numbers.
  uint64_t seed;
};

// Called with every new id; a result other than 0 stops.
typedef int (*pleach_on_token)(int32_t id, void *user);

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Why the last call of this thread failed. Valid until the next failure.
const char *pleach_last_error(void);

// The version of this library.
const char *pleach_version(void);

// Opens a plan file with the weights of a model folder or safetensors file. `options` may be null.
//
// # Safety
// The paths are C strings; `options` is null or readable.
struct pleach_session *pleach_open(const char *plan, const char *weights, const struct pleach_options *options);

// Closes a session; null is allowed.
//
// # Safety
// The session came from `pleach_open` and is not used again.
void pleach_close(struct pleach_session *session);

// Facts about the model as JSON: kind, vocab, hidden, eos, …. Valid as long as the session.
//
// # Safety
// The session is live or null.
const char *pleach_describe(struct pleach_session *session);

// The capacity of a symbol (`T`, `S`, `C`, `P`), or 0 when the plan has no such symbol.
//
// # Safety
// The session is live or null, the name a C string.
uint64_t pleach_capacity(struct pleach_session *session, const char *symbol);

// Runs `infer` on sequences of ids: sequence `i` is `ids[segments[i]..segments[i + 1]]`, `segments` has
// `sequences + 1` values.
//
// # Safety
// The session is live or null, `segments` has `sequences + 1` values, `ids` as many as its last one says.
int pleach_infer(struct pleach_session *session, const int32_t *ids, const size_t *segments, size_t sequences);

// Runs any entry with inputs by name.
//
// # Safety
// The session is live or null; `inputs` has `count` values, each with a name and `len` values.
int pleach_run(struct pleach_session *session, const char *entry, const struct pleach_input *inputs, size_t count);

// An f32 output of the last run: its values, its shape (up to 8 numbers) and rank. Valid until the next call.
//
// # Safety
// The session is live or null, the name a C string; the results are writable, `shape` for 8 numbers, or null.
int pleach_output(struct pleach_session *session,
                  const char *name,
                  const float **values,
                  uint64_t *shape,
                  size_t *rank);

// Continues one prompt; stops at any end-of-sequence id of the model. Writes the new ids to `out`, which has room for
// `max_new_tokens`, and their number to `count`. `out` and `on_token` may be null.
//
// # Safety
// The session is live or null, `ids` has `len` values, `sampling` is readable, `out` has room, `count` is writable.
int pleach_generate(struct pleach_session *session,
                    const int32_t *ids,
                    size_t len,
                    const struct pleach_sampling *sampling,
                    pleach_on_token on_token,
                    void *user,
                    int32_t *out,
                    size_t *count);

// Puts an adapter into a slot. The safetensors file names its tensors by the keys of the plan. On failure the slot keeps
// what it had.
//
// # Safety
// The session is live or null, the path a C string.
int pleach_load_slot(struct pleach_session *session,
                     uint32_t slot,
                     const char *path);

// Empties a slot: the model without that adapter.
//
// # Safety
// The session is live or null.
int pleach_clear_slot(struct pleach_session *session, uint32_t slot);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* PLEACH_H */
