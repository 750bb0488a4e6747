/* Into the threads of the library's own operations: what team.py says of compiled code that shares its rows out. */

#ifndef DISCREET_TEAM_H
#define DISCREET_TEAM_H

typedef void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

/* Run work(data) in so many threads. Without GOMP_parallel's address one thread does all. */
static inline void together(void (*work)(void *), void *data, Py_ssize_t threads, Py_ssize_t enter)
{
    if (enter && threads > 1)
        ((parallel)enter)(work, data, (unsigned)threads, 0);
    else
        work(data);
}

#endif
