// SPDX-License-Identifier: Apache-2.0
/* Reads a pack of refmoe, and tells whether the values of an engine are legal. C99, libc alone, one header.

       refmoe_case c;
       if (!refmoe_open(&c, "pack/cases/window-1")) { puts(c.error); return 1; }
       ... compute, and after each step:
       refmoe_result r = refmoe_compare(&c, "prefill", "layers.0.attention.q", REFMOE_FLOAT32, q, 3 * 4 * 8, NULL);
       if (r.status == REFMOE_OUTSIDE) printf("value %zu is %g, not in [%g, %g]\n", r.index, r.found, r.low, r.high);
       refmoe_close(&c);

   PACK.md defines the files. Memory is allocated for the files of a case and for nothing else. Objects in their JSON are
   searched from the start each time, which is fast enough for files of this size. It needs a little-endian machine.    */
#ifndef REFMOE_PACK_H
#define REFMOE_PACK_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef enum { REFMOE_FLOAT32, REFMOE_BFLOAT16, REFMOE_FLOAT16 } refmoe_dtype;

typedef enum {
    REFMOE_PASS,
    REFMOE_OUTSIDE, /* a value is outside its interval, or an expert must not be chosen */
    REFMOE_ABSENT,  /* the pack does not have this tap of this run */
    REFMOE_LENGTH,  /* the tap has another number of values: `judged` of the result */
    REFMOE_BROKEN   /* case.json and values.bin do not fit each other */
} refmoe_status;

typedef struct {
    refmoe_status status;
    size_t judged;     /* the values, or tokens, that were judged; of REFMOE_LENGTH the number that was expected */
    size_t outside;    /* how many of them are wrong */
    size_t index;      /* the first wrong value, in the order of your array */
    double found;      /* that value */
    double low, high;  /* its interval; of a choice of experts the id of one that is missing, or NaN */
} refmoe_result;

typedef struct { char *bytes; size_t size; } refmoe_file;
typedef struct { refmoe_file config, index, values, weights; char error[320]; } refmoe_case;

typedef struct {
    const char *taps, *tokens; /* where they lie in case.json */
    char name[64], op[16];
    size_t sequence, past, first, count;
} refmoe_run;

/* ---- JSON: a value is where its text begins. All functions give NULL where it is not there. */

static inline const char *refmoe_blank(const char *s) { return s + strspn(s, " \t\r\n"); }

static inline const char *refmoe_after_string(const char *s) { /* s is at the opening quote */
    for (s++; *s && *s != '"'; s++)
        if (*s == '\\' && s[1]) s++;
    return *s ? s + 1 : NULL;
}

static inline const char *refmoe_after(const char *s) { /* what follows a value */
    size_t depth = 0;
    do {
        s = refmoe_blank(s);
        if (*s == '"') {
            if (!(s = refmoe_after_string(s))) return NULL;
        } else if (*s == '{' || *s == '[') depth++, s++;
        else if (*s == '}' || *s == ']') {
            if (!depth--) return NULL;
            s++;
        } else {
            size_t n = strcspn(s, ",:{}[]\" \t\r\n"); /* a number or a word; or a comma or colon inside */
            if (!n && (!depth || !*s)) return NULL;
            s += n ? n : 1;
        }
    } while (depth);
    return refmoe_blank(s);
}

static inline const char *refmoe_field(const char *object, const char *name) {
    const char *s = object ? refmoe_blank(object) : "";
    if (*s != '{') return NULL;
    for (s = refmoe_blank(s + 1); s && *s == '"';) {
        const char *key = s + 1, *end = refmoe_after_string(s);
        if (!end || *(s = refmoe_blank(end)) != ':') return NULL;
        s = refmoe_blank(s + 1);
        if ((size_t)(end - 1 - key) == strlen(name) && !strncmp(key, name, strlen(name))) return s;
        s = refmoe_after(s);
        if (s && *s == ',') s = refmoe_blank(s + 1);
    }
    return NULL;
}

static inline const char *refmoe_item(const char *list, size_t i) {
    const char *s = list ? refmoe_blank(list) : "";
    if (*s != '[' || *(s = refmoe_blank(s + 1)) == ']') return NULL;
    for (; s && i; i--) {
        s = refmoe_after(s);
        if (!s || *s != ',') return NULL;
        s = refmoe_blank(s + 1);
    }
    return s;
}

static inline size_t refmoe_count(const char *list) {
    size_t n = 0;
    while (refmoe_item(list, n)) n++; /* lists of a pack are short */
    return n;
}

static inline double refmoe_number(const char *s, double otherwise) {
    return s && strchr("-0123456789", *s) && *s ? strtod(s, NULL) : otherwise;
}

static inline size_t refmoe_size(const char *s) { /* an integer from 0; 0 where it is none */
    double x = refmoe_number(s, 0);
    return x > 0 && x < 1e15 ? (size_t)x : 0;
}

static inline int refmoe_text(const char *s, char *text, size_t size) { /* whether it is a string that fits */
    const char *end = s && *s == '"' ? refmoe_after_string(s) : NULL;
    if (!end || (size_t)(end - s - 2) >= size) return 0;
    memcpy(text, s + 1, (size_t)(end - s - 2)), text[end - s - 2] = 0;
    return 1;
}

/* ---- files */

static inline int refmoe_read(refmoe_case *c, refmoe_file *file, const char *folder, const char *name) {
    char path[256];
    long size = -1;
    int fits = snprintf(path, sizeof path, "%s/%s", folder, name) < (int)sizeof path;
    FILE *f = fits ? fopen(path, "rb") : NULL;
    if (f && !fseek(f, 0, SEEK_END)) size = ftell(f);
    if (size >= 0 && !fseek(f, 0, SEEK_SET) && (file->bytes = malloc((size_t)size + 1))) {
        file->size = fread(file->bytes, 1, (size_t)size, f);
        file->bytes[file->size] = 0; /* so that text ends */
    }
    if (f) fclose(f);
    if (file->bytes && file->size == (size_t)size) return 1;
    snprintf(c->error, sizeof c->error, "%s: cannot be read", path);
    return 0;
}

static inline void refmoe_close(refmoe_case *c) {
    free(c->config.bytes), free(c->index.bytes), free(c->values.bytes), free(c->weights.bytes);
    memset(c, 0, sizeof *c);
}

/* whether the case was read; if not, `error` says why, and nothing has to be closed */
static inline int refmoe_open(refmoe_case *c, const char *folder) {
    char error[sizeof c->error];
    memset(c, 0, sizeof *c);
    if (refmoe_read(c, &c->config, folder, "config.json") && refmoe_read(c, &c->index, folder, "case.json") &&
        refmoe_read(c, &c->values, folder, "values.bin") && refmoe_read(c, &c->weights, folder, "model.safetensors")) {
        const char *format = refmoe_field(c->index.bytes, "format");
        if (format && !strncmp(format, "\"1\"", 3) && refmoe_field(c->config.bytes, "hidden_size")) return 1;
        snprintf(c->error, sizeof c->error, "%.200s: is not a case of a pack in format 1", folder);
    }
    memcpy(error, c->error, sizeof error);
    refmoe_close(c);
    memcpy(c->error, error, sizeof error);
    return 0;
}

/* a number of config.json; `otherwise` where it is null or not there */
static inline double refmoe_config(const refmoe_case *c, const char *name, double otherwise) {
    return refmoe_number(refmoe_field(c->config.bytes, name), otherwise);
}

static inline int refmoe_get_run(const refmoe_case *c, size_t i, refmoe_run *run) { /* whether there is a run i */
    const char *s = refmoe_item(refmoe_field(c->index.bytes, "runs"), i);
    run->taps = refmoe_field(s, "taps"), run->tokens = refmoe_field(s, "tokens");
    run->sequence = refmoe_size(refmoe_field(s, "sequence")), run->past = refmoe_size(refmoe_field(s, "past"));
    run->first = refmoe_size(refmoe_field(s, "first")), run->count = refmoe_count(run->tokens);
    return run->taps && refmoe_text(refmoe_field(s, "run"), run->name, sizeof run->name) &&
           refmoe_text(refmoe_field(s, "op"), run->op, sizeof run->op);
}

static inline size_t refmoe_token(const refmoe_run *run, size_t i) { return refmoe_size(refmoe_item(run->tokens, i)); }

static inline float refmoe_bfloat16(const char *at) {
    uint16_t half;
    uint32_t bits;
    float value;
    memcpy(&half, at, 2), bits = (uint32_t)half << 16, memcpy(&value, &bits, 4);
    return value;
}

/* whether the case has a tensor of n elements with this name; its values go to `weight` */
static inline int refmoe_weight(const refmoe_case *c, const char *name, float *weight, size_t n) {
    uint64_t length = 0;
    if (c->weights.size < 8) return 0;
    memcpy(&length, c->weights.bytes, 8);
    if (length > c->weights.size - 8) return 0;
    const char *at = refmoe_field(refmoe_field(c->weights.bytes + 8, name), "data_offsets");
    size_t start = 8 + (size_t)length + refmoe_size(refmoe_item(at, 0));
    size_t end = 8 + (size_t)length + refmoe_size(refmoe_item(at, 1));
    if (!at || end > c->weights.size || start > end || end - start != 2 * n) return 0;
    for (size_t i = 0; i < n; i++) weight[i] = refmoe_bfloat16(c->weights.bytes + start + 2 * i);
    return 1;
}

/* ---- verdicts */

static inline double refmoe_radius(unsigned char code, int base) {
    static const double mantissa[8] = {1.0, 1.0905077326652577, 1.189207115002721, 1.2968395546510096,
                                       1.4142135623730951, 1.5422108254079407, 1.681792830507429, 1.8340080864093424};
    return code ? ldexp(mantissa[(code - 1) % 8], base + (code - 1) / 8) : 0;
}

static inline const char *refmoe_tap(const refmoe_case *c, const char *run, const char *tap) {
    refmoe_run each;
    for (size_t i = 0; refmoe_get_run(c, i, &each); i++)
        if (!strcmp(each.name, run)) return refmoe_field(each.taps, tap);
    return NULL;
}

/* the number of values of a tap, and where they lie; the tap is whole if its bytes lie in the file */
static inline size_t refmoe_values(const refmoe_case *c, const char *tap, size_t width, const char **at) {
    size_t n = 1, start = refmoe_size(refmoe_field(tap, "at"));
    const char *shape = refmoe_field(tap, "shape");
    for (size_t i = 0; i < 3 && refmoe_item(shape, i) && n < c->values.size; i++)
        n *= refmoe_size(refmoe_item(shape, i)) % (1u << 24);
    *at = start <= c->values.size && n <= (c->values.size - start) / width ? c->values.bytes + start : NULL;
    return n;
}

/* Holds the values of a tap against their intervals.

   values: n of them, row-major   experts: of a tap with slots the ids in the order of the engine's slots, [T, k], or NULL
   where the slots are in ascending order of ids already                                                             */
static inline refmoe_result refmoe_compare(const refmoe_case *c, const char *run, const char *tap, refmoe_dtype dtype,
                                           const float *values, size_t n, const int32_t *experts) {
    refmoe_result r = {REFMOE_ABSENT, 0, 0, 0, NAN, NAN, NAN};
    const char *entry = refmoe_tap(c, run, tap), *at, *base = refmoe_item(refmoe_field(entry, "base"), dtype);
    if (!entry) return r;
    size_t count = refmoe_values(c, entry, 7, &at), shape[3] = {1, 1, 1}; /* 4 bytes of centre and 3 codes */
    for (size_t i = 0; i < 3; i++)
        if (refmoe_item(refmoe_field(entry, "shape"), i))
            shape[i] = refmoe_size(refmoe_item(refmoe_field(entry, "shape"), i));
    r.status = !at || !base ? REFMOE_BROKEN : count != n ? REFMOE_LENGTH : REFMOE_PASS;
    r.judged = r.status == REFMOE_LENGTH ? count : 0;
    for (size_t i = 0; i < n && (r.status == REFMOE_PASS || r.status == REFMOE_OUTSIDE); i++) {
        size_t j = i; /* where the interval of value i lies */
        if (experts) {
            size_t token = i / (shape[1] * shape[2]), slot = i / shape[2] % shape[1], rank = 0;
            const int32_t *ids = experts + token * shape[1];
            for (size_t s = 0; s < shape[1]; s++) rank += ids[s] < ids[slot] || (ids[s] == ids[slot] && s < slot);
            j = (token * shape[1] + rank) * shape[2] + i % shape[2];
        }
        unsigned char code = (unsigned char)at[4 * n + n * dtype + j];
        float centre;
        if (code == 255) continue;
        memcpy(&centre, at + 4 * j, 4);
        double radius = refmoe_radius(code, (int)refmoe_number(base, 0));
        double low = (double)centre - radius, high = (double)centre + radius;
        r.judged++;
        if ((double)values[i] >= low && (double)values[i] <= high) continue;
        if (!r.outside++) r.index = i, r.found = (double)values[i], r.low = low, r.high = high;
        r.status = REFMOE_OUTSIDE;
    }
    return r;
}

/* Judges the choice of experts of each token. ids: n of them, [T, k], in any order */
static inline refmoe_result refmoe_compare_experts(const refmoe_case *c, const char *run, const char *tap,
                                                   refmoe_dtype dtype, const int32_t *ids, size_t n) {
    refmoe_result r = {REFMOE_ABSENT, 0, 0, 0, NAN, NAN, NAN};
    const char *entry = refmoe_tap(c, run, tap), *at;
    if (!entry) return r;
    size_t count = refmoe_values(c, entry, 3, &at), E = refmoe_size(refmoe_item(refmoe_field(entry, "shape"), 1));
    size_t k = (size_t)refmoe_config(c, "num_experts_per_tok", 0), tokens = E ? count / E : 0;
    r.status = !at || !E || !k ? REFMOE_BROKEN : tokens * k != n ? REFMOE_LENGTH : REFMOE_PASS;
    r.judged = r.status == REFMOE_LENGTH ? tokens * k : 0;
    for (size_t t = 0; t < tokens && (r.status == REFMOE_PASS || r.status == REFMOE_OUTSIDE); t++, r.judged++) {
        const unsigned char *state = (const unsigned char *)at + count * dtype + t * E;
        size_t wrong = k, missing = E; /* the first slot that is wrong, and the first expert that is missing */
        for (size_t j = k; j-- > 0;) {
            int32_t id = ids[t * k + j];
            int repeated = 0;
            for (size_t i = 0; i < j; i++) repeated |= ids[t * k + i] == id;
            if (repeated || id < 0 || (size_t)id >= E || !state[id]) wrong = j;
        }
        for (size_t e = E; e-- > 0;) {
            int chosen = 0;
            for (size_t j = 0; j < k; j++) chosen |= ids[t * k + j] == (int32_t)e;
            if (state[e] == 2 && !chosen) missing = e;
        }
        if (wrong == k && missing == E) continue;
        size_t index = t * k + (wrong < k ? wrong : 0);
        if (!r.outside++) r.index = index, r.found = ids[index], r.low = r.high = missing < E ? (double)missing : NAN;
        r.status = REFMOE_OUTSIDE;
    }
    return r;
}

#endif
