# accel: `make` prints this help.
.DEFAULT_GOAL := help

CC      ?= gcc
CFLAGS  ?= -O2 -g
WARN    := -std=c11 -Wall -Wextra -Werror -D_GNU_SOURCE
B       := build/c

CSRC    := $(wildcard csrc/*.c csrc/models/*.c csrc/passes/*.c csrc/schedulers/*.c \
             kernels/cpu/*.c kernels/null/*.c)
OBJ     := $(CSRC:%.c=$(B)/%.o)
CTESTS  := $(patsubst tests/c/%.c,$(B)/tests/%,$(wildcard tests/c/test_*.c))

.PHONY: help lib check-c clean
help: ## this text
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

lib: $(B)/libaccel.a ## the engine and its CPU kernels as a static library

$(B)/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(WARN) $(CFLAGS) -fPIC -MMD -MP -c $< -o $@

$(B)/libaccel.a: $(OBJ)
	@rm -f $@
	ar rcs $@ $^

$(B)/tests/%: tests/c/%.c $(B)/libaccel.a
	@mkdir -p $(@D)
	$(CC) $(WARN) $(CFLAGS) -MMD -MP $< $(B)/libaccel.a -lm -lpthread -ldl -o $@

check-c: $(CTESTS) ## build and run the C tests
	@for t in $(CTESTS); do echo "== $$t"; $$t || exit 1; done

clean: ## remove what was built
	rm -rf build

-include $(OBJ:.o=.d) $(CTESTS:=.d)
