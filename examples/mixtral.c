// SPDX-License-Identifier: Apache-2.0
/* A small Mixtral in C11 and float32, with libc and libm alone: easy to read, not fast.

   It grew out of `refmoe conform --scaffold c`: the reader of JSON and `main` are the scaffold's, the model is new.

       cc -std=c11 -Wall -Wextra -Werror -O2 -o mixtral mixtral.c -lm && refmoe conform -- ./mixtral

   Letters of dimensions: T new tokens, S cached ones with the new ones included, D dim, H query heads, K key/value
   heads, d head_dim, E experts, F hidden_dim. All matrices are row-major; it needs a little-endian machine.          */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char DESCRIPTION[] =
    "{\"protocol\": \"1\", \"name\": \"mixtral.c\", \"version\": \"1\", \"dtypes\": [\"float32\"], "
    "\"taps\": [\"embedding\", \"attention_norm\", \"attention.q\", \"attention.k\", \"attention.v\", "
    "\"attention.q_rope\", \"attention.k_rope\", \"attention.scores\", \"attention.probs\", \"attention.context\", "
    "\"attention.output\", \"attention_residual\", \"moe_norm\", \"router.logits\", \"router.experts\", "
    "\"router.weights\", \"expert.gate\", \"expert.up\", \"expert.hidden\", \"expert.output\", \"moe.output\", "
    "\"residual\", \"final_norm\", \"logits\"], "
    "\"abilities\": [\"chunk\", \"decode\", \"sequences\"], \"policies\": {}, \"layouts\": [\"hf\"]}";

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

static size_t integer(const Json *j) { /* from 0; 0 where it is none */
    return j && j->type == 'n' && j->number > 0 && j->number < 1e15 ? (size_t)j->number : 0;
}

/* ---- files: config.json and safetensors */

static char *read_text(const char *path) { /* or NULL */
    FILE *file = fopen(path, "rb");
    char *text = NULL;
    long size;
    if (file && !fseek(file, 0, SEEK_END) && (size = ftell(file)) >= 0 && !fseek(file, 0, SEEK_SET)) {
        text = need(calloc((size_t)size + 1, 1));
        if (fread(text, 1, (size_t)size, file) != (size_t)size) free(text), text = NULL;
    }
    if (file) fclose(file);
    return text;
}

typedef struct { /* an open model.safetensors */
    FILE *file;
    Json *header;
    uint64_t start; /* of the data */
    char wrong[512]; /* about the first tensor that was not as expected; "" where all were */
} Weights;

static int open_weights(Weights *weights, const char *path) { /* whether it succeeded */
    uint64_t length = 0;
    *weights = (Weights){.file = fopen(path, "rb")};
    if (!weights->file || fread(&length, 8, 1, weights->file) != 1 || length > 1u << 30) return 0;
    char *text = need(calloc(length + 1, 1));
    const char *s = text;
    if (fread(text, 1, length, weights->file) == length) weights->header = json_value(&s, 0);
    weights->start = 8 + length;
    free(text);
    return weights->header != NULL;
}

static void close_weights(Weights *weights) {
    json_free(weights->header);
    if (weights->file) fclose(weights->file);
}

static float *read_floats(FILE *file, size_t n, int wide) { /* n numbers of float32, or bfloat16; or NULL */
    float *values = need(calloc(n + 1, sizeof *values));
    uint16_t *halves = need(calloc(n + 1, sizeof *halves));
    size_t found = wide ? fread(values, sizeof *values, n, file) : fread(halves, sizeof *halves, n, file);
    for (size_t i = 0; !wide && i < n; i++) {
        uint32_t bits = (uint32_t)halves[i] << 16; /* a bfloat16 is the upper half of a float32 */
        memcpy(&values[i], &bits, sizeof bits);
    }
    free(halves);
    if (found == n) return values;
    free(values);
    return NULL;
}

/* the weight of a module, [rows, columns], or [columns] where rows is 0; NULL where it is not there in this shape */
static float *read_weight(Weights *weights, const char *module, size_t rows, size_t columns) {
    char name[256];
    snprintf(name, sizeof name, "%.200s.weight", module);
    const Json *entry = get(weights->header, name), *shape = get(entry, "shape"), *at = get(entry, "data_offsets");
    const char *dtype = text_of(get(entry, "dtype"));
    int wide = !strcmp(dtype, "F32"), fits = count(shape) == (rows ? 2 : 1) && (wide || !strcmp(dtype, "BF16"));
    float *values = NULL;
    if (fits && rows) fits = integer(shape->first) == rows && integer(shape->first->next) == columns;
    else if (fits) fits = integer(shape->first) == columns;
    if (fits && count(at) == 2 && !fseek(weights->file, (long)(weights->start + integer(at->first)), SEEK_SET))
        values = read_floats(weights->file, (rows ? rows : 1) * columns, wide);
    if (!values && !*weights->wrong)
        snprintf(weights->wrong, sizeof weights->wrong, "%s is missing, or not of the shape in config.json", name);
    return values;
}

/* ---- values: each has its place in the file from the moment that it is computed */

typedef struct { char key[256]; const char *tap, *dtype; size_t rank, shape[3]; void *data; } Tensor;
typedef struct { char prefix[256]; Tensor *tensors; size_t n, size; } Values;

/* room for a value of this shape; c = 0 where it has two dimensions */
static void *add(Values *values, const char *dtype, const char *tap, size_t a, size_t b, size_t c) {
    if (values->n == values->size)
        values->tensors = need(realloc(values->tensors, (values->size += 256) * sizeof *values->tensors));
    Tensor *tensor = &values->tensors[values->n++];
    *tensor = (Tensor){.tap = tap, .dtype = dtype, .rank = c ? 3 : 2, .shape = {a, b, c ? c : 1}};
    snprintf(tensor->key, sizeof tensor->key, "%.220s%s", values->prefix, tap);
    return tensor->data = need(calloc(a * b * tensor->shape[2] + 1, 4));
}

static float *value(Values *values, const char *tap, size_t a, size_t b, size_t c) {
    return add(values, "F32", tap, a, b, c);
}

static int is_among(const Json *list, const char *text) {
    const Json *j = list ? list->first : NULL;
    while (j && strcmp(text_of(j), text)) j = j->next;
    return j != NULL;
}

static int write_values(const char *path, const Values *values, const Json *taps) { /* whether it succeeded */
    FILE *file = fopen(path, "wb");
    uint64_t length = 0, offset = 0;
    if (!file) return 0;
    fwrite(&length, 8, 1, file), fputc('{', file);
    for (const Tensor *t = values->tensors; t < values->tensors + values->n; t++) {
        if (!is_among(taps, t->tap)) continue;
        uint64_t size = 4 * t->shape[0] * t->shape[1] * t->shape[2];
        fputs(offset ? "," : "", file), put_string(file, t->key);
        fprintf(file, ":{\"dtype\":\"%s\",\"shape\":[%zu,%zu", t->dtype, t->shape[0], t->shape[1]);
        if (t->rank == 3) fprintf(file, ",%zu", t->shape[2]);
        fprintf(file, "],\"data_offsets\":[%llu,", (unsigned long long)offset);
        fprintf(file, "%llu]}", (unsigned long long)(offset += size));
    }
    fputc('}', file), length = (uint64_t)ftell(file) - 8;
    for (const Tensor *t = values->tensors; t < values->tensors + values->n; t++)
        if (is_among(taps, t->tap)) fwrite(t->data, 4, t->shape[0] * t->shape[1] * t->shape[2], file);
    int failed = fseek(file, 0, SEEK_SET) || fwrite(&length, 8, 1, file) != 1 || ferror(file);
    return !(fclose(file) || failed);
}

static void free_values(Values *values) {
    for (size_t i = 0; i < values->n; i++) free(values->tensors[i].data);
    free(values->tensors);
}

/* ---- the model */

typedef struct { float *w1, *w2, *w3; } Expert; /* [F, D], [D, F], [F, D] */
typedef struct { float *attention_norm, *wq, *wk, *wv, *wo, *moe_norm, *gate; Expert *experts; } Layer;
typedef struct {
    size_t dim, layers, heads, kv_heads, head_dim, hidden, vocab, experts, chosen, window; /* window 0: none */
    float eps;
    double theta;
    float *embedding, *final_norm, *output;
    Layer *layer;
} Model;

static Model model; /* nothing is loaded where `layer` is NULL */

static void free_model(void) {
    for (size_t i = 0; model.layer && i < model.layers; i++) {
        Layer *l = &model.layer[i];
        for (size_t e = 0; l->experts && e < model.experts; e++)
            free(l->experts[e].w1), free(l->experts[e].w2), free(l->experts[e].w3);
        free(l->attention_norm), free(l->wq), free(l->wk), free(l->wv), free(l->wo);
        free(l->moe_norm), free(l->gate), free(l->experts);
    }
    free(model.embedding), free(model.final_norm), free(model.output), free(model.layer);
    model = (Model){0};
}

static int read_config(const Json *c) { /* whether it can be a Mixtral */
    model.dim = integer(get(c, "hidden_size")), model.layers = integer(get(c, "num_hidden_layers"));
    model.heads = integer(get(c, "num_attention_heads")), model.kv_heads = integer(get(c, "num_key_value_heads"));
    model.hidden = integer(get(c, "intermediate_size")), model.vocab = integer(get(c, "vocab_size"));
    model.experts = integer(get(c, "num_local_experts")), model.chosen = integer(get(c, "num_experts_per_tok"));
    model.window = integer(get(c, "sliding_window")), model.head_dim = integer(get(c, "head_dim"));
    if (!model.head_dim && model.heads) model.head_dim = model.dim / model.heads;
    const Json *eps = get(c, "rms_norm_eps"), *theta = get(c, "rope_theta");
    model.eps = eps ? (float)eps->number : 0, model.theta = theta ? theta->number : 0;
    return model.dim && model.layers && model.kv_heads && model.heads % model.kv_heads == 0 && model.head_dim &&
           model.hidden && model.vocab && model.chosen && model.chosen <= model.experts && eps && theta;
}

static float *layer_weight(Weights *weights, size_t i, const char *module, size_t rows, size_t columns) {
    char name[128];
    snprintf(name, sizeof name, "model.layers.%zu.%s", i, module);
    return read_weight(weights, name, rows, columns);
}

static void read_layer(Weights *weights, size_t i) {
    Layer *l = &model.layer[i];
    size_t D = model.dim, F = model.hidden, d = model.head_dim, queries = model.heads * d, keys = model.kv_heads * d;
    l->attention_norm = layer_weight(weights, i, "input_layernorm", 0, D);
    l->wq = layer_weight(weights, i, "self_attn.q_proj", queries, D);
    l->wk = layer_weight(weights, i, "self_attn.k_proj", keys, D);
    l->wv = layer_weight(weights, i, "self_attn.v_proj", keys, D);
    l->wo = layer_weight(weights, i, "self_attn.o_proj", D, queries);
    l->moe_norm = layer_weight(weights, i, "post_attention_layernorm", 0, D);
    l->gate = layer_weight(weights, i, "block_sparse_moe.gate", model.experts, D);
    l->experts = need(calloc(model.experts, sizeof *l->experts));
    for (size_t e = 0; e < model.experts; e++) {
        char name[64];
        snprintf(name, sizeof name, "block_sparse_moe.experts.%zu.w1", e);
        char *digit = name + strlen(name) - 1;
        l->experts[e].w1 = layer_weight(weights, i, name, F, D);
        *digit = '2', l->experts[e].w2 = layer_weight(weights, i, name, D, F);
        *digit = '3', l->experts[e].w3 = layer_weight(weights, i, name, F, D);
    }
}

static const char *load(const char *checkpoint) { /* what is wrong, or NULL */
    static char wrong[512];
    char path[4096];
    Weights weights;
    *wrong = 0;
    free_model();
    snprintf(path, sizeof path, "%.4000s/config.json", checkpoint);
    char *text = read_text(path);
    const char *s = text;
    Json *config = text ? json_value(&s, 0) : NULL;
    int usable = read_config(config);
    free(text), json_free(config);
    if (!usable) return "config.json is missing, or not a Mixtral's";
    snprintf(path, sizeof path, "%.4000s/model.safetensors", checkpoint);
    if (open_weights(&weights, path)) {
        model.layer = need(calloc(model.layers, sizeof *model.layer));
        model.embedding = read_weight(&weights, "model.embed_tokens", model.vocab, model.dim);
        for (size_t i = 0; i < model.layers; i++) read_layer(&weights, i);
        model.final_norm = read_weight(&weights, "model.norm", 0, model.dim);
        model.output = read_weight(&weights, "lm_head", model.vocab, model.dim);
        memcpy(wrong, weights.wrong, sizeof wrong);
    } else snprintf(wrong, sizeof wrong, "model.safetensors is missing, or not one");
    close_weights(&weights);
    if (*wrong) free_model();
    return *wrong ? wrong : NULL;
}

typedef struct { size_t sequence, tokens; long long *positions; float **k, **v; } Cache; /* k, v per layer [S, K, d] */

static float dot(const float *a, const float *b, size_t n) {
    float sum = 0;
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void linear(float *y, const float *x, size_t rows, const float *weight, size_t out, size_t in) { /* y = x w^T */
    for (size_t r = 0; r < rows; r++)
        for (size_t o = 0; o < out; o++) y[r * out + o] = dot(x + r * in, weight + o * in, in);
}

static void rms_norm(float *y, const float *x, size_t rows, const float *gain) {
    for (size_t r = 0, D = model.dim; r < rows; r++, x += D, y += D) {
        float mean_square = dot(x, x, D) / (float)D, root = sqrtf(mean_square + model.eps);
        for (size_t i = 0; i < D; i++) y[i] = x[i] / root * gain[i];
    }
}

/* of the elements that are not -infinity, at least one; the others become 0 */
static void softmax(float *y, const float *x, size_t n) {
    float largest = -INFINITY, sum = 0;
    for (size_t i = 0; i < n; i++) largest = fmaxf(largest, x[i]);
    for (size_t i = 0; i < n; i++) sum += y[i] = expf(x[i] - largest);
    for (size_t i = 0; i < n; i++) y[i] /= sum;
}

/* element i of each head turns with element i + d/2; angles in double, as float has few bits left beyond 32768 */
static void rotate(float *y, const float *x, size_t rows, size_t heads, const long long *positions) {
    size_t d = model.head_dim, half = d / 2;
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < half; i++) {
            double angle = (double)positions[r] * pow(model.theta, -2.0 * (double)i / (double)d);
            float c = (float)cos(angle), s = (float)sin(angle);
            for (size_t h = 0; h < heads; h++) {
                const float *from = x + (r * heads + h) * d + i;
                float *to = y + (r * heads + h) * d + i;
                to[0] = from[0] * c - from[half] * s, to[half] = from[half] * c + from[0] * s;
            }
        }
}

/* what one query head of one token makes of all cached keys and values */
static void attend(const float *query, const Cache *cache, size_t layer, size_t head, long long position, float *scores,
                   float *probs, float *context) {
    size_t S = cache->tokens, d = model.head_dim, row = model.kv_heads * d;
    size_t shared = head / (model.heads / model.kv_heads) * d; /* consecutive query heads read one key/value head */
    const float *keys = cache->k[layer] + shared, *values = cache->v[layer] + shared;
    for (size_t s = 0; s < S; s++) scores[s] = dot(query, keys + s * row, d) / sqrtf((float)d);
    for (size_t s = 0; s < S; s++) {
        long long distance = position - cache->positions[s];
        int visible = distance >= 0 && (!model.window || distance < (long long)model.window);
        probs[s] = visible ? scores[s] : -INFINITY;
    }
    softmax(probs, probs, S);
    for (size_t s = 0; s < S; s++)
        for (size_t i = 0; i < d; i++) context[i] += probs[s] * values[s * row + i];
}

/* x: [T, D], whose tokens' positions are in the cache already   returns: [T, D] */
static float *attention(Values *values, const Layer *l, size_t layer, const float *x, size_t T, Cache *cache) {
    size_t D = model.dim, H = model.heads, K = model.kv_heads, d = model.head_dim, S = cache->tokens;
    const long long *positions = cache->positions + S - T;
    float *q = value(values, "attention.q", T, H, d), *q_rope = value(values, "attention.q_rope", T, H, d);
    float *k = value(values, "attention.k", T, K, d), *k_rope = value(values, "attention.k_rope", T, K, d);
    float *v = value(values, "attention.v", T, K, d);
    linear(q, x, T, l->wq, H * d, D), linear(k, x, T, l->wk, K * d, D), linear(v, x, T, l->wv, K * d, D);
    rotate(q_rope, q, T, H, positions), rotate(k_rope, k, T, K, positions);
    memcpy(cache->k[layer] + (S - T) * K * d, k_rope, T * K * d * sizeof *k);
    memcpy(cache->v[layer] + (S - T) * K * d, v, T * K * d * sizeof *v);
    float *scores = value(values, "attention.scores", H, T, S), *probs = value(values, "attention.probs", H, T, S);
    float *context = value(values, "attention.context", T, H, d), *output = value(values, "attention.output", T, D, 0);
    for (size_t t = 0; t < T; t++)
        for (size_t h = 0; h < H; h++) {
            size_t at = (t * H + h) * d, row = (h * T + t) * S;
            attend(q_rope + at, cache, layer, h, positions[t], scores + row, probs + row, context + at);
        }
    linear(output, context, T, l->wo, D, H * d);
    return output;
}

/* the largest logits, the largest first, of equal ones the one of the lower id */
static void top_k(int32_t *ids, float *chosen, const float *logits) {
    for (size_t j = 0; j < model.chosen; j++) {
        ids[j] = -1;
        for (int32_t e = 0; e < (int32_t)model.experts; e++) {
            int taken = 0;
            for (size_t i = 0; i < j; i++) taken |= ids[i] == e;
            if (!taken && (ids[j] < 0 || logits[e] > logits[ids[j]])) ids[j] = e;
        }
        chosen[j] = logits[ids[j]];
    }
}

static float *moe(Values *values, const Layer *l, const float *x, size_t T) { /* x: [T, D]   returns: [T, D] */
    size_t D = model.dim, E = model.experts, k = model.chosen, F = model.hidden;
    float *logits = value(values, "router.logits", T, E, 0), *weights = value(values, "router.weights", T, k, 0);
    int32_t *ids = add(values, "I32", "router.experts", T, k, 0);
    float *gate = value(values, "expert.gate", T, k, F), *up = value(values, "expert.up", T, k, F);
    float *hidden = value(values, "expert.hidden", T, k, F), *output = value(values, "expert.output", T, k, D);
    float *mixed = value(values, "moe.output", T, D, 0);
    linear(logits, x, T, l->gate, E, D);
    for (size_t t = 0; t < T; t++, x += D, mixed += D, ids += k, weights += k) {
        top_k(ids, weights, logits + t * E);
        softmax(weights, weights, k);
        for (size_t j = 0; j < k; j++, gate += F, up += F, hidden += F, output += D) {
            const Expert *expert = &l->experts[ids[j]];
            linear(gate, x, 1, expert->w1, F, D), linear(up, x, 1, expert->w3, F, D);
            for (size_t f = 0; f < F; f++) hidden[f] = gate[f] / (1 + expf(-gate[f])) * up[f];
            linear(output, hidden, 1, expert->w2, D, F);
            for (size_t i = 0; i < D; i++) mixed[i] += weights[j] * output[i];
        }
    }
    return mixed - T * D;
}

static void sum(float *y, const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = a[i] + b[i];
}

/* all values of new tokens of one sequence, which have been appended to its cache */
static void forward(Values *values, const char *run, const size_t *tokens, size_t T, Cache *cache) {
    size_t D = model.dim;
    snprintf(values->prefix, sizeof values->prefix, "%.200s/", run);
    float *x = value(values, "embedding", T, D, 0);
    for (size_t t = 0; t < T; t++) memcpy(x + t * D, model.embedding + tokens[t] * D, D * sizeof *x);
    for (size_t i = 0; i < model.layers; i++) {
        const Layer *l = &model.layer[i];
        snprintf(values->prefix, sizeof values->prefix, "%.200s/layers.%zu.", run, i);
        float *normed = value(values, "attention_norm", T, D, 0);
        rms_norm(normed, x, T, l->attention_norm);
        float *attended = attention(values, l, i, normed, T, cache), *h = value(values, "attention_residual", T, D, 0);
        sum(h, x, attended, T * D);
        normed = value(values, "moe_norm", T, D, 0);
        rms_norm(normed, h, T, l->moe_norm);
        float *mixed = moe(values, l, normed, T);
        x = value(values, "residual", T, D, 0);
        sum(x, h, mixed, T * D);
    }
    snprintf(values->prefix, sizeof values->prefix, "%.200s/", run);
    float *normed = value(values, "final_norm", T, D, 0), *logits = value(values, "logits", T, model.vocab, 0);
    rms_norm(normed, x, T, model.final_norm);
    linear(logits, normed, T, model.output, model.vocab, D);
}

/* ---- the runs of a case */

/* the cache of a sequence among `n`, a fresh one with room for `capacity` tokens where it has none yet */
static Cache *cache_of(Cache *caches, size_t *n, size_t sequence, size_t capacity) {
    for (size_t i = 0; i < *n; i++)
        if (caches[i].sequence == sequence) return &caches[i];
    Cache *cache = &caches[(*n)++];
    *cache = (Cache){.sequence = sequence};
    cache->positions = need(calloc(capacity + 1, sizeof *cache->positions));
    cache->k = need(calloc(model.layers, sizeof *cache->k)), cache->v = need(calloc(model.layers, sizeof *cache->v));
    for (size_t i = 0; i < model.layers; i++) {
        cache->k[i] = need(calloc(capacity * model.kv_heads * model.head_dim + 1, sizeof(float)));
        cache->v[i] = need(calloc(capacity * model.kv_heads * model.head_dim + 1, sizeof(float)));
    }
    return cache;
}

static void free_caches(Cache *caches, size_t n) {
    for (size_t c = 0; c < n; c++) {
        for (size_t i = 0; i < model.layers; i++) free(caches[c].k[i]), free(caches[c].v[i]);
        free(caches[c].k), free(caches[c].v), free(caches[c].positions);
    }
    free(caches);
}

static const char *one_run(Values *values, const Json *each, Cache *cache) { /* what is wrong, or NULL */
    const Json *tokens = get(each, "tokens"), *positions = get(each, "positions");
    size_t T = count(tokens), n = 0, past = integer(get(each, "past"));
    if (!T || count(positions) != T || past > cache->tokens) return "tokens, positions and past do not fit";
    cache->tokens = past; /* cut, where it holds more */
    size_t *ids = need(calloc(T, sizeof *ids));
    const Json *p = positions->first;
    for (const Json *t = tokens->first; t; t = t->next, p = p->next) {
        ids[n++] = integer(t);
        cache->positions[cache->tokens++] = (long long)integer(p);
    }
    while (n && ids[n - 1] < model.vocab) n--;
    if (!n) forward(values, text_of(get(each, "run")), ids, T, cache);
    free(ids);
    return n ? "a token is beyond the vocabulary" : NULL;
}

static const char *run(const Json *runs, const Json *taps, const char *out) { /* what is wrong, or NULL */
    Values values = {0};
    Cache *caches = need(calloc(count(runs) + 1, sizeof *caches));
    size_t n = 0, capacity = 0;
    const char *wrong = NULL;
    for (const Json *each = runs->first; each; each = each->next) capacity += count(get(each, "tokens"));
    for (const Json *each = runs->first; each && !wrong; each = each->next)
        wrong = one_run(&values, each, cache_of(caches, &n, integer(get(each, "sequence")), capacity));
    if (!wrong && !write_values(out, &values, taps)) wrong = "the file cannot be written";
    free_caches(caches, n), free_values(&values);
    return wrong;
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
            wrong = load(text_of(get(request, "checkpoint")));
            if (!wrong) puts("{\"ok\": true}");
        } else if (!strcmp(command, "run") && model.layer && get(request, "runs")) {
            wrong = run(get(request, "runs"), get(request, "taps"), text_of(get(request, "out")));
            if (!wrong) puts("{\"ok\": true}");
        } else if (stopping) puts("{\"ok\": true}");
        else wrong = "the request is unknown, or came too early";
        if (wrong) answer("error", wrong);
        fflush(stdout);
        json_free(request);
        if (stopping) break;
    }
    free(line), free_model();
    return 0;
}
