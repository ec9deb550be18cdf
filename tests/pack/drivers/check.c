// SPDX-License-Identifier: Apache-2.0
/* check FOLDER: reads lines `run tap dtype values experts` from standard input, and prints a judgement for each.

   values: a file of float32, or of int32 for a choice of experts   experts: a file of int32, or -                   */
#include "refmoe_pack.h"

static void *content(const char *path, size_t *n) {
    FILE *file = fopen(path, "rb");
    char *bytes = calloc(1u << 22, 1);
    if (!file || !bytes) exit(3);
    *n = fread(bytes, 1, 1u << 22, file) / 4;
    fclose(file);
    return bytes;
}

int main(int count, char **arguments) {
    static const char *const statuses[] = {"pass", "outside", "absent", "length", "broken"};
    static const char *const dtypes[] = {"float32", "bfloat16", "float16"};
    char run[64], tap[64], dtype[16], values[512], experts[512];
    refmoe_case c;
    if (count != 2) return 3;
    if (!refmoe_open(&c, arguments[1])) return puts(c.error), 2;
    while (scanf("%63s %63s %15s %511s %511s", run, tap, dtype, values, experts) == 5) {
        size_t n = 0, unused = 0, place = 0;
        void *found = content(values, &n), *ids = strcmp(experts, "-") ? content(experts, &unused) : NULL;
        while (strcmp(dtypes[place], dtype)) place++;
        refmoe_result r = strstr(tap, "router.experts")
                              ? refmoe_compare_experts(&c, run, tap, (refmoe_dtype)place, found, n)
                              : refmoe_compare(&c, run, tap, (refmoe_dtype)place, found, n, ids);
        printf("%s %zu %zu %zu %.17g %.17g %.17g\n", statuses[r.status], r.judged, r.outside, r.index, r.found, r.low,
               r.high);
        free(found), free(ids);
    }
    refmoe_close(&c);
    return 0;
}
