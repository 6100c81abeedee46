// The texts of metal/*.metal with their headers inlined; the build generates the definitions (embed_shaders.py).
#pragma once

namespace fused_adam {
extern const char* const kAdamShader;
extern const char* const kGradNormShader;
}  // namespace fused_adam
