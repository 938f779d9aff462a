/* Which instruction set runs: a table per set, chosen when first used. */
#include "kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const zs_kernels *const all[] = {
#ifdef ZS_X86
    &zs_kernels_avx512bf16,
    &zs_kernels_avx512,
    &zs_kernels_avx2,
#endif
    &zs_kernels_portable,
};
enum { COUNT = sizeof all / sizeof *all };

const zs_kernels *const *zs_kernels_all(int *count)
{
    *count = COUNT;
    return all;
}

static void say_names(char *text, int size, int only_supported)
{
    int used = 0;
    text[0] = 0;
    for (int i = 0; i < COUNT && used < size; i++)
        if (!only_supported || all[i]->supported())
            used += snprintf(text + used, (size_t)(size - used), "%s%s", used ? ", " : "", all[i]->name);
}

const zs_kernels *zs_kernels_named(const char *name, char *message, int size)
{
    const char *origin = "isa";
    if (!name || !*name) {
        name = getenv("ZS_ISA");
        origin = "ZS_ISA";
    }
    char names[128];
    for (int i = 0; i < COUNT; i++) {
        if (!name || !*name) {
            if (all[i]->supported())
                return all[i];
        } else if (strcmp(name, all[i]->name) == 0) {
            if (all[i]->supported())
                return all[i];
            say_names(names, sizeof names, 1);
            snprintf(message, (size_t)size, "%s=%s: this processor lacks it; it has %s", origin, name, names);
            return NULL;
        }
    }
    say_names(names, sizeof names, 0);
    snprintf(message, (size_t)size, "%s=%.64s: unknown, it is one of %s", origin, name ? name : "", names);
    return NULL;
}
