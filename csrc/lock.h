/* lock: mutexes that a child of fork finds free.
 *
 * fork copies one thread and the memory of all, so a mutex that another thread holds at that moment
 * stays locked in the child for ever, around data that is half changed.  Here fork waits until no
 * thread holds any; whoever forks with one in hand (a driver that starts a helper program while it
 * is opened) does not wait for itself.
 *
 * Never take one and then wait for something that a forking thread may hold, as Python's lock.
 */
#ifndef AC_LOCK_H
#define AC_LOCK_H

#include "base.h"

#include <pthread.h>

void ac_lock(pthread_mutex_t *mutex);
void ac_unlock(pthread_mutex_t *mutex);

/* How often this process is a child of fork: who counts what other threads do begins anew when it
 * changes. */
uint32_t ac_fork_generation(void);

#endif
