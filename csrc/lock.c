/* lock: a gate in front of all mutexes.  Whoever holds a mutex is inside; fork waits until nobody
 * is.  See lock.h. */
#include "lock.h"

#include <stdatomic.h>

/* Of the default kind, which prefers readers: a thread that is inside may enter again while fork
 * waits, else the two would wait for each other. */
static pthread_rwlock_t gate = PTHREAD_RWLOCK_INITIALIZER;
/* Who comes from outside passes here first; fork keeps it shut, else threads that come and go would
 * hold the gate between them for ever. */
static pthread_mutex_t door = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local int32_t held; /* mutexes that this thread holds */
static _Atomic uint32_t generation;

static void
before_fork(void)
{
    if (!held) {
        pthread_mutex_lock(&door);
        pthread_rwlock_wrlock(&gate);
    }
}

static void
after_fork(void)
{
    if (!held) {
        pthread_rwlock_unlock(&gate);
        pthread_mutex_unlock(&door);
    }
}

/* Those who were inside or waited outside are gone. */
static void
in_child(void)
{
    pthread_mutex_init(&door, NULL);
    pthread_rwlock_init(&gate, NULL);
    for (int32_t i = 0; i < held; i++) {
        pthread_rwlock_rdlock(&gate);
    }
    atomic_fetch_add(&generation, 1);
}

static void
register_fork(void)
{
    pthread_atfork(before_fork, after_fork, in_child);
}

void
ac_lock(pthread_mutex_t *mutex)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, register_fork);
    if (held) {
        pthread_rwlock_rdlock(&gate);
    } else {
        pthread_mutex_lock(&door);
        pthread_rwlock_rdlock(&gate);
        pthread_mutex_unlock(&door);
    }
    pthread_mutex_lock(mutex);
    held++;
}

void
ac_unlock(pthread_mutex_t *mutex)
{
    pthread_mutex_unlock(mutex);
    held--;
    pthread_rwlock_unlock(&gate);
}

uint32_t
ac_fork_generation(void)
{
    return atomic_load(&generation);
}
