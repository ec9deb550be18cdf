// SPDX-License-Identifier: Apache-2.0
/* A harness for refmoe: it answers requests about your engine, a line of JSON each (refmoe/engines/PROTOCOL.md).

   Unchanged, it writes one tap, `embedding`, as an example, and skips every case. Write your engine where it says
   HERE. It needs a little-endian machine and no library but libm. Only answers may be printed to standard output.

       cc -std=c11 -Wall -Wextra -Werror -O2 -o harness harness.c -lm && refmoe conform -- ./harness                  */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* HERE: describe the engine.
   dtypes: of float64, float32, bfloat16, float16.   taps: of golden/FORMAT.md, without layer; the more, the sharper the
   verdicts.   abilities: of chunk, decode, sequences.   policies: per dtype one of `refmoe policies`.                */
static const char DESCRIPTION[] =
    "{\"protocol\": \"1\", \"name\": \"my-engine\", \"version\": \"0\", \"dtypes\": [\"float32\"], "
    "\"taps\": [\"embedding\", \"logits\"], \"abilities\": [], \"policies\": {}, \"layouts\": [\"hf\"]}";

/* ==== shared part: the same bytes stand in refmoe/engines/scaffold/harness.c and in examples/mixtral.c.
   Each is one file that a person copies, so neither includes the other. A test compares them.                        */

static void *need(void *memory) {
    if (!memory) { fputs("out of memory\n", stderr); exit(1); }
    return memory;
}

/* ---- JSON: a value has its name, if it is in an object, and the list of its elements */

typedef struct Json {
    char type; /* { [ " n (number) t f 0 (null) */
    char *name, *text;
    double number;
    struct Json *first, *next;
} Json;

static void json_free(Json *j) {
    while (j) {
        Json *next = j->next;
        json_free(j->first);
        free(j->name), free(j->text), free(j);
        j = next;
    }
}

static void blank(const char **s) { *s += strspn(*s, " \t\r\n"); }

static char *json_string(const char **s) { /* starts at a quote; NULL when it is not a string */
    if (*(*s)++ != '"') return NULL;
    char *text = need(malloc(strlen(*s) + 1)), *end = text;
    while (**s != '"') {
        unsigned c = (unsigned char)*(*s)++, low;
        if (!c) { free(text); return NULL; }
        if (c != '\\') { *end++ = (char)c; continue; }
        const char *from = "bfnrt", *to = "\b\f\n\r\t", *at = **s ? strchr(from, **s) : NULL;
        if (**s != 'u') {
            if (!**s) { free(text); return NULL; }
            *end++ = at ? to[at - from] : **s, (*s)++;
            continue;
        }
        if (sscanf(*s, "u%4x", &c) != 1 || strlen(*s) < 5) { free(text); return NULL; }
        *s += 5;
        if (c >= 0xD800 && c < 0xDC00 && strlen(*s) >= 6 && sscanf(*s, "\\u%4x", &low) == 1)
            c = 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00), *s += 6;
        if (c < 0x80) *end++ = (char)c;
        else if (c < 0x800) *end++ = (char)(0xC0 | c >> 6), *end++ = (char)(0x80 | (c & 63));
        else {
            if (c < 0x10000) *end++ = (char)(0xE0 | c >> 12);
            else *end++ = (char)(0xF0 | c >> 18), *end++ = (char)(0x80 | (c >> 12 & 63));
            *end++ = (char)(0x80 | (c >> 6 & 63)), *end++ = (char)(0x80 | (c & 63));
        }
    }
    (*s)++, *end = 0;
    return text;
}

static Json *json_value(const char **s, int depth) { /* NULL when it is not JSON */
    Json *j = need(calloc(1, sizeof *j)), **last = &j->first;
    blank(s);
    j->type = **s;
    if (j->type == '"') {
        if ((j->text = json_string(s))) return j;
    } else if ((j->type == '{' || j->type == '[') && depth < 64) {
        char close = j->type == '{' ? '}' : ']';
        for ((*s)++, blank(s); **s != close; last = &(*last)->next) {
            char *name = NULL;
            if (j->first && *(*s)++ != ',') goto wrong;
            blank(s);
            if (close == '}') {
                if (!(name = json_string(s)) || (blank(s), *(*s)++ != ':')) { free(name); goto wrong; }
            }
            if (!(*last = json_value(s, depth + 1))) { free(name); goto wrong; }
            (*last)->name = name;
            blank(s);
        }
        (*s)++;
        return j;
    } else if (!strncmp(*s, "true", 4)) return *s += 4, j;
    else if (!strncmp(*s, "false", 5)) return *s += 5, j;
    else if (!strncmp(*s, "null", 4)) return *s += 4, j->type = 0, j;
    else {
        char *end;
        j->number = strtod(*s, &end), j->type = 'n';
        if (end != *s) return *s = end, j;
    }
wrong:
    json_free(j);
    return NULL;
}

static const Json *get(const Json *j, const char *name) { /* a field, or NULL */
    for (j = j ? j->first : NULL; j && (!j->name || strcmp(j->name, name)); j = j->next) {}
    return j;
}

static const char *text_of(const Json *j) { return j && j->text ? j->text : ""; }
static size_t count(const Json *j) {
    size_t n = 0;
    for (j = j ? j->first : NULL; j; j = j->next) n++;
    return n;
}

static void put_string(FILE *file, const char *text) {
    fputc('"', file);
    for (; *text; text++)
        if ((unsigned char)*text < 32) fprintf(file, "\\u%04x", (unsigned)*text);
        else if (strchr("\"\\", *text)) fprintf(file, "\\%c", *text);
        else fputc(*text, file);
    fputc('"', file);
}

static const char *answer(const char *what, const char *text) { /* {"error": ...} or {"skipped": ...} */
    printf("{\"%s\": ", what), put_string(stdout, text), puts("}");
    return text;
}

/* ==== end of the shared part */

/* ---- safetensors */

typedef struct { char key[256]; size_t rank, shape[8]; float *values; } Tensor; /* written as F32 */

static size_t elements(const Tensor *t) {
    size_t n = 1;
    for (size_t i = 0; i < t->rank; i++) n *= t->shape[i];
    return n;
}

static size_t width_of(const char *dtype) { /* bytes of an element, 0 for a dtype that is not read here */
    if (!strcmp(dtype, "F64")) return 8;
    if (!strcmp(dtype, "F32")) return 4;
    return !strcmp(dtype, "BF16") || !strcmp(dtype, "F16") ? 2 : 0;
}

static float element(const unsigned char *at, const char *dtype) {
    uint16_t half = 0;
    uint32_t word = 0;
    float value;
    double wide;
    if (!strcmp(dtype, "F64")) return memcpy(&wide, at, 8), (float)wide;
    if (!strcmp(dtype, "F32")) return memcpy(&value, at, 4), value;
    memcpy(&half, at, 2);
    if (!strcmp(dtype, "BF16")) word = (uint32_t)half << 16; /* the upper half of a float32 */
    else { /* 1 bit of sign, 5 of exponent, 10 of fraction */
        int exponent = half >> 10 & 31, fraction = half & 1023;
        if (exponent == 31) value = fraction ? NAN : INFINITY;
        else value = ldexpf((float)(fraction + (exponent ? 1024 : 0)), (exponent ? exponent : 1) - 25);
        return half >> 15 ? -value : value;
    }
    return memcpy(&value, &word, 4), value;
}

/* Reads a tensor of these dtypes and of any rank up to 8 as floats. Returns whether it succeeded. */
static int read_tensor(const char *folder, const char *name, Tensor *t) {
    char path[4096];
    uint64_t length = 0;
    char *header = NULL;
    unsigned char *raw = NULL;
    Json *all = NULL;
    memset(t, 0, sizeof *t);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    FILE *file = fopen(path, "rb");
    if (file && fread(&length, 8, 1, file) == 1 && length < 1u << 30 && (header = calloc(length + 1, 1)) &&
        fread(header, 1, length, file) == length) {
        const char *s = header;
        const Json *entry = get(all = json_value(&s, 0), name);
        const Json *shape = get(entry, "shape"), *at = get(entry, "data_offsets");
        const char *dtype = text_of(get(entry, "dtype"));
        size_t width = width_of(dtype);
        if (shape && count(shape) <= sizeof t->shape / sizeof *t->shape && count(at) == 2 && width &&
            !fseek(file, (long)(8 + length + (uint64_t)at->first->number), SEEK_SET)) {
            for (const Json *j = shape->first; j; j = j->next) t->shape[t->rank++] = (size_t)j->number;
            size_t n = elements(t);
            raw = need(malloc(n * width + 1));
            if (fread(raw, width, n, file) == n) {
                t->values = need(malloc(n * sizeof *t->values + 1));
                for (size_t i = 0; i < n; i++) t->values[i] = element(raw + i * width, dtype);
            }
        }
    }
    json_free(all), free(header), free(raw);
    if (file) fclose(file);
    return t->values != NULL;
}

static int write_tensors(const char *path, const Tensor *tensors, size_t n) { /* returns whether it succeeded */
    FILE *file = fopen(path, "wb");
    uint64_t length = 0, offset = 0;
    if (!file) return 0;
    fwrite(&length, 8, 1, file), fputc('{', file);
    for (size_t i = 0; i < n; i++) {
        fputs(i ? "," : "", file), put_string(file, tensors[i].key), fputs(":{\"dtype\":\"F32\",\"shape\":[", file);
        for (size_t k = 0; k < tensors[i].rank; k++) fprintf(file, k ? ",%zu" : "%zu", tensors[i].shape[k]);
        fprintf(file, "],\"data_offsets\":[%llu,", (unsigned long long)offset);
        offset += 4 * elements(&tensors[i]);
        fprintf(file, "%llu]}", (unsigned long long)offset);
    }
    fputc('}', file), length = (uint64_t)ftell(file) - 8;
    for (size_t i = 0; i < n; i++) fwrite(tensors[i].values, 4, elements(&tensors[i]), file);
    int failed = fseek(file, 0, SEEK_SET) || fwrite(&length, 8, 1, file) != 1 || ferror(file);
    return !(fclose(file) || failed);
}

/* ---- the engine */

static Tensor embedding; /* [vocabulary, width] */

static const char *load(const char *checkpoint, const char *dtype) { /* returns an error, or NULL */
    (void)dtype; /* HERE: load the model. The checkpoint is a Hugging Face directory, config.json and safetensors. */
    free(embedding.values);
    if (!read_tensor(checkpoint, "model.embed_tokens.weight", &embedding) || embedding.rank != 2)
        return "model.embed_tokens.weight cannot be read";
    return NULL;
}

static int wanted(const Json *taps, const char *tap) {
    for (const Json *j = taps->first; j; j = j->next)
        if (!strcmp(text_of(j), tap)) return 1;
    return 0;
}

static const char *run(const Json *runs, const Json *taps, const char *out) { /* returns an error, or NULL */
    size_t n = 0, width = embedding.shape[1];
    int written = 1;
    Tensor *tensors = need(calloc(count(runs) + 1, sizeof *tensors));
    /* HERE: run the model. Each run has `run` (its name), `op`, `sequence`, `tokens`, `positions` and `past`. Cut the
       cache of its sequence to `past` tokens first. Write the taps in `taps` under the names `<run>/<tap>`. */
    for (const Json *each = runs->first; each; each = each->next) {
        if (!wanted(taps, "embedding")) break;
        const Json *tokens = get(each, "tokens");
        Tensor *t = &tensors[n++];
        t->rank = 2, t->shape[0] = count(tokens), t->shape[1] = width;
        snprintf(t->key, sizeof t->key, "%.200s/embedding", text_of(get(each, "run")));
        float *row = t->values = need(calloc(elements(t) + 1, 4));
        for (const Json *j = tokens ? tokens->first : NULL; j; j = j->next, row += width)
            if (j->number >= 0 && j->number < (double)embedding.shape[0])
                memcpy(row, embedding.values + (size_t)j->number * width, 4 * width);
            else written = 0;
    }
    if (!write_tensors(out, tensors, n)) written = 0;
    for (size_t i = 0; i < n; i++) free(tensors[i].values);
    free(tensors);
    return written ? NULL : "the file cannot be written, or a token is none";
}

int main(void) {
    size_t size = 1 << 16, n = 0;
    char *line = need(malloc(size));
    for (int c; (c = getchar()) != EOF;) {
        if (c != '\n') {
            if (n + 2 > size) line = need(realloc(line, size *= 2));
            line[n++] = (char)c;
            continue;
        }
        const char *s = (line[n] = 0, n = 0, line), *wrong = NULL;
        Json *request = json_value(&s, 0);
        const char *command = text_of(get(request, "command"));
        int stopping = !strcmp(command, "stop");
        if (!strcmp(command, "start")) puts(DESCRIPTION);
        else if (!strcmp(command, "load")) {
            wrong = load(text_of(get(request, "checkpoint")), text_of(get(request, "dtype")));
            if (!wrong) puts("{\"ok\": true}");
        } else if (!strcmp(command, "run") && embedding.values && get(request, "runs") && get(request, "taps")) {
            wrong = run(get(request, "runs"), get(request, "taps"), text_of(get(request, "out")));
            if (!wrong) answer("skipped", "not written yet"); /* HERE: puts("{\"ok\": true}"), once logits are there */
        } else if (stopping) puts("{\"ok\": true}");
        else wrong = "the request is unknown, or came too early";
        if (wrong) answer("error", wrong);
        fflush(stdout);
        json_free(request);
        if (stopping) break;
    }
    free(line), free(embedding.values);
    return 0;
}
