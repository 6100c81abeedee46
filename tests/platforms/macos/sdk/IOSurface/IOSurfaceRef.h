// Stand-in for IOSurface: only the types that metal-cpp names.
// Used to cross-compile where Apple's SDK is not at hand; a Mac build never sees it.
#pragma once

typedef struct __IOSurface* IOSurfaceRef;
