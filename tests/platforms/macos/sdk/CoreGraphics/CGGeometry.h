// Stand-in for CoreGraphics geometry: only the types that metal-cpp names.
// Used to cross-compile where Apple's SDK is not at hand; a Mac build never sees it.
#pragma once

typedef double CGFloat;
typedef struct CGSize {
  CGFloat width;
  CGFloat height;
} CGSize;
