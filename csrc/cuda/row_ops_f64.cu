#include "row_ops_impl.cuh"

template struct spo::cuda::TypedOps<double>;
