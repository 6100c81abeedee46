// In place of MLX's header of this name, which gives bfloat the mathematical functions through Apple compiler builtins
// (__metal_fabs and so on); shim/msl_math.h already defines those functions for bfloat.
