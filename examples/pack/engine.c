// SPDX-License-Identifier: Apache-2.0
/* A small Mixtral in C99 and float32 that judges itself by a pack of refmoe. Plain loops, easy to read, not fast.

       cc -std=c99 -O2 -o engine engine.c -lm && ./engine pack

   Letters of dimensions: T new tokens, S cached ones with the new ones included, D dim, H query heads, K key/value
   heads, d head_dim, E experts, k chosen ones, F hidden_dim, V vocabulary.                                          */
#include "refmoe_pack.h"

static refmoe_case c;
static size_t D, H, K, d, E, k, F, V, layers, window; /* window 0: none */
static float eps;
static double theta;
static const char *name_of_run;
static size_t judged, outside; /* in this case; a wrong value is printed once, the first one */

static void *need(void *memory) {
    if (!memory) fputs("out of memory\n", stderr), exit(2);
    return memory;
}

static float *numbers(size_t n) { return need(calloc(n + 1, sizeof(float))); }

/* ---- the verdict */

static void take(const char *tap, refmoe_result r) {
    if (r.status == REFMOE_LENGTH) printf("%s/%s: has another number of values, %zu were expected\n", name_of_run, tap, r.judged);
    if (r.status == REFMOE_LENGTH || r.status == REFMOE_BROKEN) exit(2);
    if (r.outside && !outside)
        printf("  first wrong: %s/%s: value %zu is %.9g, legal are %.9g to %.9g; %zu of %zu are wrong\n", name_of_run, tap,
               r.index, r.found, r.low, r.high, r.outside, r.judged);
    judged += r.judged, outside += r.outside;
}

static const char *name_of(const char *tap, int layer) { /* layer -1: a tap outside the layers */
    static char name[64];
    if (layer < 0) snprintf(name, sizeof name, "%s", tap);
    else snprintf(name, sizeof name, "layers.%d.%s", layer, tap);
    return name;
}

/* holds a tap against the pack, and gives it back; ids: where it has a slot for each chosen expert */
static float *check(float *values, size_t n, const char *tap, int layer, const int32_t *ids) {
    const char *name = name_of(tap, layer);
    take(name, refmoe_compare(&c, name_of_run, name, REFMOE_FLOAT32, values, n, ids));
    return values;
}

/* ---- the model; all weights of a case are read when they are used, which is good enough for so small ones */

static float *weight(int layer, const char *module, int expert, size_t n) {
    char name[128];
    float *values = numbers(n);
    if (layer < 0) snprintf(name, sizeof name, "%s.weight", module);
    else if (expert < 0) snprintf(name, sizeof name, "model.layers.%d.%s.weight", layer, module);
    else snprintf(name, sizeof name, "model.layers.%d.block_sparse_moe.experts.%d.%s.weight", layer, expert, module);
    if (!refmoe_weight(&c, name, values, n)) printf("%s: is not there with %zu elements\n", name, n), exit(2);
    return values;
}

/* x [T, in] times the transpose of a matrix [out, in] */
static void multiply(float *y, const float *x, size_t T, const float *matrix, size_t out, size_t in) {
    for (size_t t = 0; t < T; t++)
        for (size_t o = 0; o < out; o++) {
            float sum = 0;
            for (size_t i = 0; i < in; i++) sum += x[t * in + i] * matrix[o * in + i];
            y[t * out + o] = sum;
        }
}

static float *linear(const float *x, size_t T, int layer, const char *module, size_t out, size_t in) {
    float *matrix = weight(layer, module, -1, out * in), *y = numbers(T * out);
    multiply(y, x, T, matrix, out, in);
    free(matrix);
    return y;
}

static float *norm(const float *x, size_t T, int layer, const char *module) {
    float *gain = weight(layer, module, -1, D), *y = numbers(T * D);
    for (size_t t = 0; t < T; t++) {
        float sum = 0;
        for (size_t i = 0; i < D; i++) sum += x[t * D + i] * x[t * D + i];
        float root = sqrtf(sum / (float)D + eps);
        for (size_t i = 0; i < D; i++) y[t * D + i] = x[t * D + i] / root * gain[i];
    }
    free(gain);
    return y;
}

/* element i of each head turns with element i + d/2; angles in double, as float has few bits left beyond 32768 */
static float *rotate(const float *x, size_t T, size_t heads, size_t first) {
    float *y = numbers(T * heads * d);
    for (size_t t = 0; t < T; t++)
        for (size_t h = 0; h < heads; h++)
            for (size_t i = 0; i < d / 2; i++) {
                double angle = (double)(first + t) * pow(theta, -2.0 * (double)i / (double)d);
                float cosine = (float)cos(angle), sine = (float)sin(angle);
                const float *from = x + (t * heads + h) * d + i;
                float *to = y + (t * heads + h) * d + i;
                to[0] = from[0] * cosine - from[d / 2] * sine, to[d / 2] = from[d / 2] * cosine + from[0] * sine;
            }
    return y;
}

static void softmax(float *x, size_t n) { /* in place; what is -infinity becomes 0 */
    float largest = -INFINITY, sum = 0;
    for (size_t i = 0; i < n; i++) largest = fmaxf(largest, x[i]);
    for (size_t i = 0; i < n; i++) sum += x[i] = expf(x[i] - largest);
    for (size_t i = 0; i < n; i++) x[i] /= sum;
}

typedef struct { float **k, **v; size_t tokens, first; } Cache; /* k, v: per layer [S, K, d]; first: position of token 0 */

/* x: [T, D]   returns: [T, D] */
static float *attention(const float *x, size_t T, int l, Cache *cache) {
    size_t S = cache->tokens + T, row = K * d, first = cache->first + cache->tokens;
    float *q = check(linear(x, T, l, "self_attn.q_proj", H * d, D), T * H * d, "attention.q", l, NULL);
    float *key = check(linear(x, T, l, "self_attn.k_proj", row, D), T * row, "attention.k", l, NULL);
    float *v = check(linear(x, T, l, "self_attn.v_proj", row, D), T * row, "attention.v", l, NULL);
    float *q_rope = check(rotate(q, T, H, first), T * H * d, "attention.q_rope", l, NULL);
    float *k_rope = check(rotate(key, T, K, first), T * row, "attention.k_rope", l, NULL);
    float *keys = cache->k[l] = need(realloc(cache->k[l], S * row * sizeof(float)));
    float *values = cache->v[l] = need(realloc(cache->v[l], S * row * sizeof(float)));
    memcpy(keys + (S - T) * row, k_rope, T * row * sizeof(float));
    memcpy(values + (S - T) * row, v, T * row * sizeof(float));
    float *scores = numbers(H * T * S), *probs = numbers(H * T * S), *context = numbers(T * H * d);
    for (size_t h = 0; h < H; h++)
        for (size_t t = 0; t < T; t++) {
            float *score = scores + (h * T + t) * S, *prob = probs + (h * T + t) * S;
            size_t shared = h / (H / K) * d; /* consecutive query heads read one key/value head */
            for (size_t s = 0; s < S; s++) {
                size_t now = S - T + t; /* the place of the query in the cache */
                int visible = s <= now && (!window || now - s < window);
                for (size_t i = 0; i < d; i++) score[s] += q_rope[(t * H + h) * d + i] * keys[s * row + shared + i];
                score[s] /= sqrtf((float)d);
                prob[s] = visible ? score[s] : -INFINITY;
            }
            softmax(prob, S);
            for (size_t s = 0; s < S; s++)
                for (size_t i = 0; i < d; i++) context[(t * H + h) * d + i] += prob[s] * values[s * row + shared + i];
        }
    check(scores, H * T * S, "attention.scores", l, NULL);
    check(probs, H * T * S, "attention.probs", l, NULL);
    check(context, T * H * d, "attention.context", l, NULL);
    float *output = check(linear(context, T, l, "self_attn.o_proj", D, H * d), T * D, "attention.output", l, NULL);
    free(q), free(key), free(v), free(q_rope), free(k_rope), free(scores), free(probs), free(context);
    return output;
}

/* the k largest logits of a token, the largest first, of equal ones the one of the lower id */
static void top_k(int32_t *ids, float *chosen, const float *logits) {
    for (size_t j = 0; j < k; j++) {
        ids[j] = -1;
        for (int32_t e = 0; e < (int32_t)E; e++) {
            int taken = 0;
            for (size_t i = 0; i < j; i++) taken |= ids[i] == e;
            if (!taken && (ids[j] < 0 || logits[e] > logits[ids[j]])) ids[j] = e;
        }
        chosen[j] = logits[ids[j]];
    }
}

/* x: [T, D]   returns: [T, D] */
static float *experts(const float *x, size_t T, int l) {
    float *logits = check(linear(x, T, l, "block_sparse_moe.gate", E, D), T * E, "router.logits", l, NULL);
    float *weights = numbers(T * k), *output = numbers(T * k * D), *sum = numbers(T * D);
    float *gate = numbers(T * k * F), *up = numbers(T * k * F), *hidden = numbers(T * k * F);
    int32_t *ids = need(calloc(T * k, sizeof *ids));
    for (size_t t = 0; t < T; t++) top_k(ids + t * k, weights + t * k, logits + t * E), softmax(weights + t * k, k);
    const char *name = name_of("router.experts", l);
    take(name, refmoe_compare_experts(&c, name_of_run, name, REFMOE_FLOAT32, ids, T * k));
    for (size_t e = 0; e < E; e++) {
        float *w1 = weight(l, "w1", (int)e, F * D), *w2 = weight(l, "w2", (int)e, D * F);
        float *w3 = weight(l, "w3", (int)e, F * D);
        for (size_t j = 0; j < T * k; j++) {
            if (ids[j] != (int32_t)e) continue;
            multiply(gate + j * F, x + j / k * D, 1, w1, F, D), multiply(up + j * F, x + j / k * D, 1, w3, F, D);
            for (size_t i = j * F; i < (j + 1) * F; i++) hidden[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
            multiply(output + j * D, hidden + j * F, 1, w2, D, F);
        }
        free(w1), free(w2), free(w3);
    }
    for (size_t j = 0; j < T * k; j++)
        for (size_t i = 0; i < D; i++) sum[j / k * D + i] += weights[j] * output[j * D + i];
    check(weights, T * k, "router.weights", l, ids);
    check(gate, T * k * F, "expert.gate", l, ids), check(up, T * k * F, "expert.up", l, ids);
    check(hidden, T * k * F, "expert.hidden", l, ids), check(output, T * k * D, "expert.output", l, ids);
    check(sum, T * D, "moe.output", l, NULL);
    free(logits), free(weights), free(output), free(gate), free(up), free(hidden), free(ids);
    return sum;
}

static void add(float *x, float *y, size_t n) { /* x += y, and y is freed */
    for (size_t i = 0; i < n; i++) x[i] += y[i];
    free(y);
}

static void forward(const refmoe_run *run, Cache *cache) {
    size_t T = run->count, n = T * D;
    float *x = numbers(n), *table = weight(-1, "model.embed_tokens", -1, V * D), *y, *normed;
    for (size_t t = 0; t < T; t++) memcpy(x + t * D, table + refmoe_token(run, t) * D, D * sizeof(float));
    free(table);
    check(x, n, "embedding", -1, NULL);
    for (int l = 0; l < (int)layers; l++) {
        normed = check(norm(x, T, l, "input_layernorm"), n, "attention_norm", l, NULL);
        add(x, attention(normed, T, l, cache), n);
        check(x, n, "attention_residual", l, NULL);
        free(normed), normed = check(norm(x, T, l, "post_attention_layernorm"), n, "moe_norm", l, NULL);
        add(x, experts(normed, T, l), n);
        check(x, n, "residual", l, NULL);
        free(normed);
    }
    cache->tokens += T;
    normed = check(norm(x, T, -1, "model.norm"), n, "final_norm", -1, NULL);
    y = check(linear(normed, T, -1, "lm_head", V, D), T * V, "logits", -1, NULL);
    free(x), free(normed), free(y);
}

/* ---- cases */

static void judge_case(const char *folder) {
    enum { SEQUENCES = 64 };
    Cache caches[SEQUENCES];
    refmoe_run run;
    memset(caches, 0, sizeof caches), judged = outside = 0;
    if (!refmoe_open(&c, folder)) puts(c.error), exit(2);
    D = (size_t)refmoe_config(&c, "hidden_size", 0), layers = (size_t)refmoe_config(&c, "num_hidden_layers", 0);
    H = (size_t)refmoe_config(&c, "num_attention_heads", 0), K = (size_t)refmoe_config(&c, "num_key_value_heads", 0);
    d = (size_t)refmoe_config(&c, "head_dim", 0), F = (size_t)refmoe_config(&c, "intermediate_size", 0);
    E = (size_t)refmoe_config(&c, "num_local_experts", 0), k = (size_t)refmoe_config(&c, "num_experts_per_tok", 0);
    V = (size_t)refmoe_config(&c, "vocab_size", 0), window = (size_t)refmoe_config(&c, "sliding_window", 0);
    eps = (float)refmoe_config(&c, "rms_norm_eps", 0), theta = refmoe_config(&c, "rope_theta", 0);
    for (size_t i = 0; refmoe_get_run(&c, i, &run); i++) {
        if (run.sequence >= SEQUENCES) puts("too many sequences"), exit(2);
        Cache *cache = &caches[run.sequence];
        if (!cache->k) cache->k = need(calloc(layers, sizeof(float *))), cache->v = need(calloc(layers, sizeof(float *)));
        cache->tokens = run.past, cache->first = run.first - run.past, name_of_run = run.name;
        forward(&run, cache);
    }
    for (size_t s = 0; s < SEQUENCES; s++) {
        for (size_t l = 0; caches[s].k && l < layers; l++) free(caches[s].k[l]), free(caches[s].v[l]);
        free(caches[s].k), free(caches[s].v);
    }
    refmoe_close(&c);
}

int main(int count, char **arguments) {
    refmoe_case pack;
    size_t wrong = 0, i = 0;
    memset(&pack, 0, sizeof pack);
    if (count != 2) return puts("usage: engine PACK"), 2;
    if (!refmoe_read(&pack, &pack.index, arguments[1], "pack.json")) return puts(pack.error), 2;
    const char *cases = refmoe_field(pack.index.bytes, "cases");
    for (char name[64], folder[256]; refmoe_text(refmoe_item(cases, i), name, sizeof name); i++) {
        snprintf(folder, sizeof folder, "%.160s/cases/%s", arguments[1], name);
        judge_case(folder);
        printf("%s: %s, %zu values judged\n", name, outside ? "not conformant" : "conformant", judged);
        wrong += outside > 0;
    }
    printf("%zu cases, %zu not conformant\n", i, wrong);
    free(pack.index.bytes);
    return wrong > 0 || !i;
}
