// Stand-in for the Objective-C message-sending header: only what metal-cpp names.
// Used to cross-compile where Apple's SDK is not at hand; a Mac build never sees it.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

void objc_msgSend(void);

#ifdef __cplusplus
}
#endif
