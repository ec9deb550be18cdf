/* A harness for refmoe: it answers requests about your engine, a line of JSON each (refmoe/conform/PROTOCOL.md).

   As it is, it skips every case; what it does do is give the tap `embedding`, as an example. Write your engine where
   it says HERE. It needs a little-endian machine and no library; nothing but answers may go to stdout.

       cc -std=c11 -Wall -Werror -O1 -o harness harness.c && refmoe conform -- ./harness                              */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* HERE: what the engine can do.
   dtypes: of float64, float32, bfloat16, float16.   taps: of golden/FORMAT.md, without layer; the more, the sharper the
   verdicts.   abilities: of chunk, decode, sequences.   policies: per dtype one of `refmoe policies`.                */
static const char DESCRIPTION[] =
    "{\"protocol\": \"1\", \"name\": \"my-engine\", \"version\": \"0\", \"dtypes\": [\"float32\"], "
    "\"taps\": [\"embedding\", \"logits\"], \"abilities\": [], \"policies\": {}, \"layouts\": [\"hf\"]}";

static void *need(void *memory) {
    if (!memory) { fputs("out of memory\n", stderr); exit(1); }
    return memory;
}

/* ---- JSON: a value with its name in an object, and the values inside it as a list */

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

static char *json_string(const char **s) { /* from its quote; NULL where it is none */
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

static Json *json_value(const char **s, int depth) { /* NULL where it is no JSON */
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

/* ---- safetensors */

typedef struct { char key[256]; size_t rows, columns; float *values; } Tensor; /* written as F32 [rows, columns] */

/* the values of a BF16 or F32 matrix, or NULL */
static float *read_tensor(const char *folder, const char *name, size_t *rows, size_t *columns) {
    char path[4096];
    uint64_t length = 0;
    float *values = NULL;
    char *header = NULL;
    Json *all = NULL;
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    FILE *file = fopen(path, "rb");
    if (file && fread(&length, 8, 1, file) == 1 && length < 1u << 30 && (header = calloc(length + 1, 1)) &&
        fread(header, 1, length, file) == length) {
        const char *s = header;
        const Json *entry = get(all = json_value(&s, 0), name);
        const Json *shape = get(entry, "shape"), *at = get(entry, "data_offsets");
        int wide = !strcmp(text_of(get(entry, "dtype")), "F32");
        if (count(shape) == 2 && count(at) == 2 && (wide || !strcmp(text_of(get(entry, "dtype")), "BF16")) &&
            !fseek(file, (long)(8 + length + (uint64_t)at->first->number), SEEK_SET)) {
            *rows = (size_t)shape->first->number, *columns = (size_t)shape->first->next->number;
            size_t n = *rows * *columns, i = 0;
            uint32_t *bits = need(malloc(n * 4 + 4));
            for (size_t skip = wide ? 0 : 2; i < n; i++) /* a bfloat16 is the upper half of a float32 */
                if (bits[i] = 0, fread((char *)(bits + i) + skip, 4 - skip, 1, file) != 1) break;
            if (i == n) values = (float *)bits;
            else free(bits);
        }
    }
    json_free(all), free(header);
    if (file) fclose(file);
    return values;
}

static int write_tensors(const char *path, const Tensor *tensors, size_t n) { /* whether it succeeded */
    FILE *file = fopen(path, "wb");
    uint64_t length = 0, offset = 0;
    if (!file) return 0;
    fwrite(&length, 8, 1, file), fputc('{', file);
    for (size_t i = 0; i < n; i++) {
        uint64_t size = 4 * tensors[i].rows * tensors[i].columns;
        fputs(i ? "," : "", file), put_string(file, tensors[i].key);
        fprintf(file, ":{\"dtype\":\"F32\",\"shape\":[%zu,%zu],\"data_offsets\":[%llu,%llu]}", tensors[i].rows,
                tensors[i].columns, (unsigned long long)offset, (unsigned long long)(offset + size));
        offset += size;
    }
    fputc('}', file), length = (uint64_t)ftell(file) - 8;
    for (size_t i = 0; i < n; i++) fwrite(tensors[i].values, 4, tensors[i].rows * tensors[i].columns, file);
    int failed = fseek(file, 0, SEEK_SET) || fwrite(&length, 8, 1, file) != 1 || ferror(file);
    return !(fclose(file) || failed);
}

/* ---- the engine */

static float *embedding;
static size_t vocabulary, width;

static const char *load(const char *checkpoint, const char *dtype) { /* what is wrong, or NULL */
    (void)dtype; /* HERE: load the model; the checkpoint is a Hugging Face directory, config.json and safetensors */
    free(embedding);
    embedding = read_tensor(checkpoint, "model.embed_tokens.weight", &vocabulary, &width);
    return embedding ? NULL : "model.embed_tokens.weight cannot be read";
}

static const char *run(const Json *runs, const char *out) { /* what is wrong, or NULL */
    size_t n = count(runs), i = 0;
    int written = 1;
    Tensor *tensors = need(calloc(n + 1, sizeof *tensors));
    /* HERE: each run has `run` (its name), `op`, `sequence`, `tokens`, `positions`, and `past`: how many tokens of its
       sequence the cache must hold, which is cut first where it holds more. Taps are `<run>/<tap>`. */
    for (const Json *each = runs->first; each; each = each->next, i++) {
        const Json *tokens = get(each, "tokens");
        tensors[i].rows = count(tokens), tensors[i].columns = width;
        snprintf(tensors[i].key, sizeof tensors[i].key, "%.200s/embedding", text_of(get(each, "run")));
        float *row = tensors[i].values = need(calloc(tensors[i].rows * width + 1, 4));
        for (const Json *t = tokens ? tokens->first : NULL; t; t = t->next, row += width)
            if (t->number >= 0 && t->number < (double)vocabulary)
                memcpy(row, embedding + (size_t)t->number * width, 4 * width);
            else written = 0;
    }
    if (!write_tensors(out, tensors, n)) written = 0;
    for (i = 0; i < n; i++) free(tensors[i].values);
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
        } else if (!strcmp(command, "run") && embedding && get(request, "runs")) {
            wrong = run(get(request, "runs"), text_of(get(request, "out")));
            if (!wrong) answer("skipped", "not written yet"); /* HERE: puts("{\"ok\": true}"), once logits are there */
        } else if (stopping) puts("{\"ok\": true}");
        else wrong = "the request is unknown, or came too early";
        if (wrong) answer("error", wrong);
        fflush(stdout);
        json_free(request);
        if (stopping) break;
    }
    free(line), free(embedding);
    return 0;
}
