// The text of metal/adam.metal with its headers inlined; the build generates the definition (embed_shader.py).
#pragma once

namespace fused_adam {
extern const char* const kAdamShader;
}
