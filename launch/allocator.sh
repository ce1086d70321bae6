# Sourced: glibc settings that a training step on CPU needs; they change no result. (Other systems ignore them.)
# A step's temporaries are as large as W. With glibc's defaults they are faulted in again at every step, page by page; kept
# in the heap instead, they fragment it, so that a step sometimes grows it by gigabytes. Mapped in huge pages they come
# back at once: 1.3 s and 6.4 GiB a step where the heap took 2 to 4 s and 10 to 12 GiB (d 4,096, 65,536 features).
export MALLOC_ARENA_MAX=1 MALLOC_TRIM_THRESHOLD_=2147483647
if grep -qs '\[never\]' /sys/kernel/mm/transparent_hugepage/enabled; then
  export MALLOC_MMAP_MAX_=0 # without huge pages the heap is the better of the two: 1.15 to 2.4 times the default
else
  export MALLOC_MMAP_THRESHOLD_=67108864 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
fi
