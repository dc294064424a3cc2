/* config: reads config.json into a struct, field by field, from a table.
 *
 *     config.json -> json -> [config] -> the model's own struct -> builder
 *
 * A model's table names every field its class has.  What is not in the table, has the wrong type,
 * is absurd, or asks for something not built raises with its name, what was found and what is
 * supported; all such fields are listed in one message.  Fields absent from the JSON keep the
 * value that the struct already holds: the class' default.  Names that start with "_" are the
 * library's own notes and are passed over.
 */
#ifndef AC_CONFIG_H
#define AC_CONFIG_H

#include "../json.h"
#include "../ops.h"

/* Limits that keep a lying config from asking for a graph of absurd size. */
enum {
    AC_MAX_BLOCKS = 8,
    AC_MAX_BLOCK_LAYERS = 16,
    AC_MAX_LAYERS = 64,      /* of a transformer */
    AC_MAX_CHANNELS = 16384,
    AC_MAX_EXTENT = 1 << 20  /* batch, height, width, tokens, vocabulary */
};

typedef enum ac_field_kind {
    AC_FIELD_INT,     /* int32_t in low..high */
    AC_FIELD_FLOAT,   /* float in low..high */
    AC_FIELD_BOOL,    /* bool */
    AC_FIELD_CHOICE,  /* int32_t: value of the choice with this text */
    AC_FIELD_BLOCKS,  /* ac_per_block: an int in low..high, or a list of them, one a block */
    AC_FIELD_FLAGS,   /* ac_per_block: a bool, or a list of them, one a block */
    AC_FIELD_LIST,    /* ac_per_block: a list of ints in low..high */
    AC_FIELD_CHOICES, /* ac_per_block: a list of choices */
    AC_FIELD_READ,    /* by `read` */
    AC_FIELD_ONLY,    /* not stored; one of the values in `only` */
    AC_FIELD_IGNORED  /* any value: the result does not depend on it */
} ac_field_kind;

typedef struct ac_choice {
    const char *text; /* NULL ends a list */
    int32_t value;
} ac_choice;

typedef struct ac_field {
    const char *name;
    ac_field_kind kind;
    bool nullable;     /* null is accepted: 0 for INT and CHOICE, else as if absent */
    size_t offset;     /* into the model's struct */
    double low, high;  /* inclusive */
    const ac_choice *choices;
    const char *only;  /* values as JSON text, separated by spaces: "null false" */
    ac_status (*read)(const ac_json *value, const char *name, void *field);
} ac_field;

/* A value for each block, or one for all (`scalar`, until ac_config_per_block spreads it). */
typedef struct ac_per_block {
    bool scalar;
    int32_t count;
    int32_t value[AC_MAX_BLOCKS];
} ac_per_block;

/* Reads what `json` has into `config`, which holds the defaults. */
ac_status ac_config_read(const ac_json *json, const char *class_name, const ac_field *fields,
                         size_t n_fields, void *config);

/* After reading: a scalar becomes n equal values; a list must have n. */
ac_status ac_config_per_block(ac_per_block *values, const char *name, int32_t n);

/* For `read` functions: an int in low..high. */
ac_status ac_config_int(const ac_json *value, const char *name, double low, double high,
                        int32_t *out);

/* "silu", "gelu" ... as diffusers' get_activation knows them, but for "mish". */
extern const ac_choice ac_config_activations[];

#endif
