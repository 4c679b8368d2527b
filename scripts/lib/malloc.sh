# Host memory for programs on a CPU: keep what is freed, in huge pages, rather than give it back and fault it in again at
# every step. A third off the CPU time of configs.gpt.Quickstart; a GPU's memory is not glibc's. Sourced, never run.
tunables=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-$tunables:glibc.malloc.trim_threshold=8589934592}
unset tunables
