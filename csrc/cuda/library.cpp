// The library's own description, which doctor reads from the file: it can be loaded only where a GPU is.

extern "C" __attribute__((visibility("default"))) const char elle_mp_cuda_targets[] = ELLE_TARGETS;
