/* Loops as vector code, for several generations of x86-64: the right one is taken when a module is loaded. */

#ifndef DISCREET_VECTORS_H
#define DISCREET_VECTORS_H

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define SEVERAL_PROCESSORS 1
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SEVERAL_PROCESSORS 0
#define FOR_EVERY_PROCESSOR
#endif

/* The iterations of the loop that follows do not depend on one another. */
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define INDEPENDENT _Pragma("GCC ivdep")
#else
#define INDEPENDENT
#endif

#endif
